"""Write the data files that the guard in guard/ learns from and is chosen on.

    python tools/guard_data.py DATA

DATA is the folder with the labelled data sets. runs/mix gets three kinds of files:
    train-SOURCE.jsonl         rows of prompts whose hash falls in the last eight tenths
    validation-SOURCE.jsonl    rows of the first two tenths, so each source has figures of its own
    test.jsonl                 a few of our own rows, because train.py would cut a larger part from the rest
No prompt is in two splits. A row and its copies (disguised, alone, in a conversation) share their split.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import re
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chat import conversation
from data import read_file, tenth_of
from errors import UserError, refuse, run, write_whole

ROOT = Path(__file__).parents[1]
LONGEST, LONGEST_PAIR = 1000, 700  # characters: a longer prompt is left out, a longer answer is cut
SOURCES = {  # name: (file, training rows at most of each class, validation rows at most of each class)
    "beavertails": ("beavertails/train.jsonl", 1000, 150),
    "saferlhf": ("safe_rlhf/train.jsonl", 225, 50),
    "saferlhf-more": ("answers/safe_rlhf_more.jsonl", 225, 50),
    "jailbroken": ("answers/gptfuzz.jsonl", 200, 60),
    "do-not-answer": ("answers/do_not_answer.jsonl", 200, 60),
    "careful": ("answers/careful_safe.jsonl", 250, 60),
    "everyday": ("answers/everyday_safe.jsonl", 400, 100),
    "prompts": ("prompts/train.jsonl", 1800, 150),
    "borderline": ("prompts/borderline_safe.jsonl", 600, 100),
    "ours": (ROOT / "samples/sample.jsonl", 300, 60),
    "ours-prompts": (ROOT / "samples/prompts.jsonl", 600, 80),
}
TENTHS = {"train": range(2, 10), "validation": range(2)}  # of all prompts
SHORT = 120  # characters of a disguised text or an earlier turn
SURROUNDED = 400  # characters of a pair or prompt that is put into harmless text
BEFORE = (
    "Sorry, I am not able to assist with this. ",
    "I'm afraid I can't do that. However, here is what I found:\n\n",
    "As an AI, I must be careful here. ",
    "Good morning! I hope you are doing well. ",
    "Sure, happy to help. ",
    "Hello,\nI have a question about something.\n\n",
    "Ok. ",
    "\n\n\n",
)
BEHIND = (
    " Let me know if you need anything else!",
    " Have a wonderful day!",
    "\n\nThank you very much for your time and patience. Kind regards, Alex",
    " Please remember to drink enough water. The weather will be fine tomorrow. My cat likes the sun.",
    "\n\nP.S. I also like cooking and long walks.",
    " ..." * 30,
    "\n" * 60,
    " " * 90,
    "\n" + "=" * 200,
    "\n***" * 40,
    " thanks" * 40,
    "\n\nIn summary, it is always good to be kind, to ask questions, and to learn something new every day.",
)

LEET = str.maketrans("aeiostAEIOST", "431057431057")
LOOK_ALIKE = str.maketrans("aceopxyABCEHKMOPTX", "асеорхуАВСЕНКМОРТХ")  # noqa: RUF001  Cyrillic


def capitals(text):
    return text.upper()


def leet(text):
    return text.translate(LEET)


def look_alike(text):
    return text.translate(LOOK_ALIKE)


def zero_width(text):
    return "\u200b".join(text)


def soft_hyphens(text):
    return "\u00ad".join(text)


def full_width(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def spaced(text):
    return "  ".join(" ".join(word) for word in text.split())


def unpunctuated(text):
    return "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))


DISGUISES = (capitals, leet, look_alike, zero_width, soft_hyphens, full_width, spaced, unpunctuated)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the labelled data sets")
    args = parser.parse_args()
    rows = {name: read(args.data / file) for name, (file, _, _) in SOURCES.items()}
    folder = Path("runs/mix")
    folder.mkdir(parents=True, exist_ok=True)
    for n, (split, tenths) in enumerate(TENTHS.items()):
        part = {name: [row for row in rows[name] if tenth_of(row) in tenths] for name in rows}
        limits = {name: sizes[n] for name, (_, *sizes) in SOURCES.items()}
        for name, (sources, make, *sizes) in COPIES.items():
            part[name] = list(make([row for source in sources for row in part[source]]))
            limits[name] = sizes[n]
        for name, limit in limits.items():
            write_whole(folder / f"{split}-{name}.jsonl", jsonl(chosen(part[name], limit)))
    own = [row for row in rows["ours"] if tenth_of(row) == 2]
    write_whole(folder / "test.jsonl", jsonl(own))


def chosen(rows, limit):
    """At most `limit` safe and `limit` unsafe rows, none of them long. Only the rows decide which."""
    rows = sorted(filter(None, map(shortened, rows)), key=digest)
    kinds = [[row for row in rows if row["is_safe"] == is_safe] for is_safe in (True, False)]
    return [row for kind in kinds for row in kind[:limit]]


def shortened(row):
    """The row with the beginning of a long answer, as a running verdict sees it; None for a long prompt."""
    if "around" in row:
        return row
    *before, last = conversation(row)
    if last["role"] == "user":
        return row if len(last["content"]) <= LONGEST else None
    room = LONGEST_PAIR - sum(len(message["content"]) for message in before)
    if len(last["content"]) <= room:
        return row
    return row | {"response": last["content"][:room]} if room > 300 and "messages" not in row else None


def is_short(row):
    return all(len(message["content"]) <= SHORT for message in conversation(row))


def digest(row):
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def disguised(rows):
    """Yield each short row with its prompt in one of DISGUISES. Its label does not decide which."""
    for row in filter(is_short, rows):
        disguise = DISGUISES[int(digest(row), 16) % len(DISGUISES)]
        yield row | {
            "prompt": disguise(row["prompt"]),
            "disguise": disguise.__name__,
            "original": row["prompt"],
        }


def composed(rows):
    """Yield each short row behind an earlier turn, which is another pair."""
    for earlier, row in itertools.pairwise(sorted(filter(is_short, rows), key=digest)):
        if earlier.get("response"):
            others = {name: row[name] for name in row if name not in ("prompt", "response")}
            yield others | {"messages": conversation(earlier) + conversation(row)}


def answers_alone(rows):
    """Yield the answer of each row that has one, as a prompt of its own with the row's labels."""
    for row in rows:
        last = conversation(row)[-1]
        if last["role"] == "assistant":
            others = {name: row[name] for name in row if name != "messages"}
            yield others | {"prompt": last["content"], "response": None}


def surrounded(rows):
    """Yield each rather short row with a little harmless text around what is judged."""
    everyday = [row["response"].strip() for row in rows if "GPTeacher" in row.get("source", "")]
    passages = everyday or BEHIND
    for row in filter(is_rather_short, rows):
        draw = random.Random(digest(row))
        around = []
        for short in (BEFORE, BEHIND):
            passage = draw.choice(passages)
            beginning = passage[: draw.choice((60, 120, 250, 500))]
            sentences = " ".join(re.split(r"(?<=[.!?])\s+", passage)[: draw.choice((1, 2, 3))])
            ways = (draw.choice(short), draw.choice(short), f"\n{beginning}\n", f" {sentences} ", passage, "")
            around.append(draw.choice(ways))
        yield put_between(row, *around)


def long_texts(rows):
    """Yield each rather short row somewhere in a long text that is harmless."""
    passages = [conversation(row)[-1]["content"].strip()[:LONGEST] for row in rows if row["is_safe"]]
    for row in filter(is_rather_short, rows):
        draw = random.Random(digest(row))
        length = math.exp(draw.uniform(math.log(1000), math.log(8000)))  # characters
        parts = []
        while sum(map(len, parts)) < length:
            parts.append(draw.choice(passages) + "\n\n")
        place = draw.randint(0, len(parts))
        yield put_between(row, "".join(parts[:place]), "\n\n" + "".join(parts[place:]))


def is_rather_short(row):
    return "messages" not in row and len(row["prompt"] + (row.get("response") or "")) <= SURROUNDED


def put_between(row, before, behind):
    """The row with text around what is judged. The label plays no part."""
    name = "response" if row.get("response") else "prompt"
    return row | {name: before + row[name] + behind, "around": [before, behind]}


AROUND = ["everyday", "beavertails", "saferlhf-more", "prompts", "ours-prompts"]
COPIES = {  # name: (sources, what makes rows of their rows, limits as above)
    "alone": (["beavertails"], answers_alone, 200, 40),
    "disguised": (["prompts", "borderline", "ours-prompts"], disguised, 900, 60),
    "conversations": (["beavertails", "everyday", "ours"], composed, 240, 40),
    "surrounded": (AROUND, surrounded, 1000, 80),
    "long": (AROUND, long_texts, 200, 40),
}


def read(path):
    """The rows of a file as they are. Raises UserError for one that cannot be read."""
    rows = list(read_file(path))
    for where, row in rows:
        refuse(isinstance(row, UserError), f"{where}: {row}")
    return [row for _, row in rows]


def jsonl(rows):
    """The bytes of a JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


if __name__ == "__main__":
    run(main)
