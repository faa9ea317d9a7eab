"""Write rows that teach a guard other languages: prompts in them, and a quarter of the mix it knows.

    python tools/guard_data.py DATA
    python tools/language_data.py DATA

runs/languages gets files named as in runs/mix. All translations of a harmful question share their split.
Harmless prompts do not say which of them are translations of each other.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import tenth_of
from errors import refuse, run, write_whole
from tools.guard_data import TENTHS, digest, jsonl, read

# Long prompts, and the long texts of the mix, are left out: they cost most of the reading.
LONGEST = 200  # characters of a prompt in another language
SHARE = 4  # one training row of the mix in so many


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the labelled data sets")
    args = parser.parse_args()
    mix = [path for path in Path("runs/mix").glob("*.jsonl") if not path.stem.endswith("-long")]
    refuse(not mix, "runs/mix has no files; run tools/guard_data.py first")
    folder = Path("runs/languages")
    folder.mkdir(parents=True, exist_ok=True)
    for path in mix:
        rows = read(path)
        if path.name.startswith("train"):
            rows = [row for row in rows if int(digest(row), 16) % SHARE == 0]
        write_whole(folder / path.name, jsonl(rows))
    rows = [row for row in read(args.data / "prompts/multilingual.jsonl") if len(row["prompt"]) <= LONGEST]
    for split, tenths in TENTHS.items():
        part = [row for row in rows if tenth_of_question(row) in tenths]
        write_whole(folder / f"{split}-languages.jsonl", jsonl(part))


def tenth_of_question(row):
    """As tenth_of, but equal for all translations of a question."""
    return tenth_of({"prompt": row.get("question") or row["prompt"]})


if __name__ == "__main__":
    run(main)
