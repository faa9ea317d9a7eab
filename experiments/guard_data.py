"""Write the two data files that the guard in guard/ learns from besides the data sets.

    python experiments/guard_data.py DATA

DATA is the folder that holds beavertails/train.jsonl.
runs/validation.jsonl gets the first two tenths of the prompts of BeaverTails and of our own samples.
runs/alone.jsonl gets the answers to BeaverTails' other prompts, as texts without those prompts.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import run, write_whole
from data import conversation, read_jsonl, tenth_of

SAMPLES = Path(__file__).parents[1] / "samples"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that holds beavertails/train.jsonl")
    args = parser.parse_args()
    pairs = read(args.data / "beavertails/train.jsonl")
    rows = [*pairs, *read(SAMPLES / "sample.jsonl"), *read(SAMPLES / "prompts.jsonl")]
    Path("runs").mkdir(exist_ok=True)
    write_whole("runs/validation.jsonl", jsonl(row for row in rows if tenth_of(row) < 2))
    write_whole("runs/alone.jsonl", jsonl(answers_alone(row for row in pairs if tenth_of(row) >= 2)))


def answers_alone(rows):
    """Yield the answer of each row that has one, as a prompt of its own with the row's labels."""
    for row in rows:
        last = conversation(row)[-1]
        if last["role"] == "assistant":
            others = {name: row[name] for name in row if name != "messages"}
            yield others | {"prompt": last["content"], "response": None}


def read(path):
    return [row for _, row in read_jsonl(path)]


def jsonl(rows):
    """The bytes of a JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


if __name__ == "__main__":
    run(main)
