"""Rows of labelled text -> token ids.

A row has
    prompt      text
    response    text; without it the prompt alone is judged
    category    {name: bool}; without it only the unsafe output learns from the row
    is_safe     bool; without it a row is safe if no category is true
as in BeaverTails (Ji et al., arXiv 2307.04657). Instead of prompt and response a row may have
    messages    [{"role", "content"}, ...]; its last turn is judged in the light of those before
"""

import hashlib
import json
import math
import re
from pathlib import Path

import datasets
import torch

from chat import encode
from common import UserError, explain, refuse

BEAVERTAILS = "PKU-Alignment/BeaverTails"
HUB_CONFIGS = {"lmsys/toxic-chat": "toxicchat0124"}  # which config to load from a data set that has several
OPENAI_LABELS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")  # OpenAI's moderation set, arXiv 2208.03274
SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".csv", ".parquet")
WINDOW = 192  # tokens, as long as most training rows: in longer windows a harmful passage goes unnoticed

# ---------------------------------------------------------------- reading


def read_rows(sources):
    """Yield (name, split, checked rows) of each file, or each split of one hub id, that `sources` name."""
    paths = [Path(source) for source in sources]
    folders = {
        path: sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) for path in paths if path.is_dir()
    }
    files = [file for path in paths for file in folders.get(path, [path])]
    if files and all(file.suffix in SUFFIXES for file in files):
        parts = ((str(file), file.name, read_file(file)) for file in files)
    else:
        unknown = len(sources) > 1 or paths[0].exists()
        refuse(unknown, f"{' '.join(map(str, sources))}: give one hub id, or {', '.join(SUFFIXES)} files")
        parts = read_hub(sources[0])
    words = {"train": "train", "test": "test", "val": "validation", "dev": "validation"}
    for name, part, rows in parts:
        split = next((words[word] for word in words if word in part.lower()), "train")
        yield name, split, [check_row(row, f"{name}, row {n}") for n, row in enumerate(rows, 1)]


def evaluation_rows(sources):
    """(checked rows, names) of all files, or of a hub id's test split if it has one."""
    parts = list(read_rows(sources))
    is_hub = not Path(sources[0]).exists() and any(split == "test" for _, split, _ in parts)
    rows = [row for _, split, part in parts for row in part if split == "test" or not is_hub]
    refuse(not rows, f"{' '.join(map(str, sources))}: there are no rows to evaluate on")
    return rows, [name for name, _, _ in parts]


def read_file(path):
    if path.suffix == ".jsonl":  # not by `datasets`, which guesses column types from the first rows
        return [row for _, row in read_jsonl(path)]
    # CSV is read as text, so no column's type is guessed and "None" stays a word.
    text = dict.fromkeys(("prompt", "response", "category", "is_safe", "user_input"), str)
    options = {"converters": text, "keep_default_na": False} if path.suffix == ".csv" else {}
    with explain(f"cannot read {path}"):
        return datasets.load_dataset(
            path.suffix[1:], data_files=str(path), split="train", **options
        ).to_list()


def read_hub(name):
    advice = "without a network give JSONL, CSV or Parquet files: --dataset train.jsonl test.jsonl"
    with explain(f"cannot load the data set {name!r}; {advice}"):
        splits = datasets.load_dataset(name, HUB_CONFIGS.get(name))
    # BeaverTails comes in two sizes; the paper's is the 30k one.
    return [
        (f"{name} {split}", split, rows.to_list()) for split, rows in splits.items() if "330k" not in split
    ]


def read_jsonl(path):
    """Yield (line number, row). Raises UserError with the number of a bad line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                with explain(f"{path}, line {number} is not JSON in UTF-8", (ValueError, RecursionError)):
                    row = json.loads(line.decode("utf-8-sig"))
                yield number, row


# ---------------------------------------------------------------- checking


def check_row(row, where):
    """A row with a `category` and `is_safe`. Raises UserError, which names the place, for wrong values."""
    row = from_known_columns(row, where)
    conversation(row, where)
    category, is_safe = row.get("category") or None, row.get("is_safe")
    if isinstance(category, str):  # CSV has no nested columns
        with explain(f"{where}: `category` must be JSON"):
            category = json.loads(category)
    known = isinstance(category, dict | None) and all(v in (True, False) for v in (category or {}).values())
    refuse(not known, f"{where}: `category` must be an object of name: true or false")
    if isinstance(is_safe, str):
        is_safe = {"true": True, "false": False, "": None}.get(is_safe.lower(), is_safe)
    if is_safe is None and category:
        is_safe = not any(category.values())
    unknown = is_safe not in (True, False)
    refuse(unknown, f"{where}: a row needs `is_safe` (true or false) or a `category`")
    return row | {"category": category, "is_safe": bool(is_safe)}


def from_known_columns(row, where):
    """A row of ToxicChat (arXiv 2310.17389) or of OpenAI's moderation set with our fields added."""
    if not isinstance(row, dict) or "is_safe" in row or "category" in row:
        return row
    names = [name for name in OPENAI_LABELS if name in row]
    if "user_input" in row and "toxicity" in row:
        row, names = row | {"prompt": row["user_input"]}, ["toxicity"]
    known = {str(row[name]).removesuffix(".0") for name in names} - {"", "None", "nan"}  # missing: unknown
    refuse(names and (not known or known - {"0", "1"}), f"{where}: {', '.join(names)} must be 0 or 1")
    return row | {"is_safe": "1" not in known} if names else row


def conversation(row, where="a row"):
    """The messages of a row, [{"role", "content"}, ...], without a blank answer.

    Raises UserError, which names the place, if they are not text or not a conversation.
    """
    row = row if isinstance(row, dict) else {}
    texts = [("user", row.get("prompt")), ("assistant", row.get("response"))]
    last = [{"role": role, "content": text} for role, text in texts if text is not None]
    messages, extra = row.get("messages"), set()
    messages = last if messages is None else messages
    try:
        # The guard would not see other fields, such as tool_calls. Parquet fills absent ones with null.
        extra = {name for m in messages for name in m if m[name] is not None} - {"role", "content"}
        messages = [{"role": m["role"], "content": m["content"] + ""} for m in messages]
    except (TypeError, LookupError):
        messages = []
    refuse(extra, f"{where}: a message has role and content only, not {', '.join(sorted(map(str, extra)))}")
    roles = [m["role"] for m in messages if m is not messages[0] or m["role"] != "system"]
    fits = roles and roles == (["user", "assistant"] * len(roles))[: len(roles)]
    form = (
        "`messages` [{role, content}, ...]: a system message if there is one, then user and assistant in turn"
    )
    refuse(not fits, f"{where}: a row needs text as `prompt` and, if it has one, `response`, or {form}")
    turn = messages[-2:] if roles[-1] == "assistant" else messages[-1:]
    other = [m for m in last if m["content"] and m not in turn]
    refuse(other, f"{where}: `prompt` and `response` are not the last turn of `messages`")
    texts = "".join(m["content"] for m in messages)
    refuse(re.search("[\ud800-\udfff]", texts), f"{where}: half of a surrogate pair is not text")
    return messages if roles[-1] == "user" or messages[-1]["content"].strip() else messages[:-1]


def encode_row(tokenizer, row, where=None):
    """encode() of a row -> (ids, start). Raises UserError, which names the place or the last text."""
    messages = conversation(row, where or "a row")
    try:
        return encode(tokenizer, messages)
    except UserError as error:
        where = where or f"the row that ends with {messages[-1]['content'][:60]!r}"
        raise UserError(f"{where}: {error}") from error


# ---------------------------------------------------------------- splits, labels, updates


def load_splits(sources):
    """({"train": rows, "validation": rows, "test": rows}, category names in the data's order).

    Each missing split takes a tenth of the training prompts. No prompt is in two splits: of given ones, test
    keeps it before validation, and validation before training.
    Raises UserError for data that cannot be learnt from.
    """
    given, names = {}, []
    for name, split, rows in read_rows(sources):
        refuse(not rows, f"{name} has no rows")
        for n, row in enumerate(rows, 1):
            names = names or list(row["category"] or [])
            odd = sorted(set(names) ^ set(row["category"])) if row["category"] else []
            refuse(odd, f"{name}, row {n}: these categories are not in every row: {', '.join(odd)}")
        given.setdefault(split, []).extend(rows)
    splits, taken = {split: [] for split in SPLITS}, set()
    missing = [split for split in SPLITS if split not in given]
    for split in [split for split in reversed(SPLITS) if split in given]:
        rows = [row for row in given[split] if prompt_key(row) not in taken]
        if left_out := len(given[split]) - len(rows):
            print(f"left out {left_out} {split} rows: their prompts are in another split that was given")
        taken |= {prompt_key(row) for row in rows}
        for row in rows:
            tenth = tenth_of(row)
            splits[missing[tenth] if split == "train" and tenth < len(missing) else split].append(row)
    for split in ("train", "validation"):
        kinds = {row["is_safe"] for row in splits[split]}
        refuse(
            len(kinds) < 2, f"the {split} split has {len(splits[split])} rows, and needs safe and unsafe ones"
        )
    return splits, names


def prompt_key(row):
    """What all rows of one prompt share: the first thing that the user says."""
    return next(m["content"] for m in conversation(row) if m["role"] == "user").strip().lower()


def tenth_of(row):
    """Which tenth of all prompts, 0 to 9, a row belongs to. No seed and no order of rows changes it."""
    return int(hashlib.sha256(prompt_key(row).encode()).hexdigest(), 16) % 10


def labels(rows, names):
    """Targets (N, 1 + K), fp32: unsafe, then the categories; NaN where unknown."""
    unknown = dict.fromkeys(names, math.nan)
    values = [[not row["is_safe"], *((row["category"] or unknown)[name] for name in names)] for row in rows]
    return torch.tensor(values, dtype=torch.float32).view(len(rows), 1 + len(names))


def epoch_updates(lengths, rows_per_update, generator):
    """The row numbers of one epoch's updates, (updates, rows_per_update), for rows of these lengths (N,).

    Rows of similar length share an update, so little is padding. Every update is full, topped up with rows
    of the same epoch, so every gradient is a mean over the same number of rows.
    """
    rows, count = len(lengths), math.ceil(len(lengths) / rows_per_update)
    order = torch.randperm(rows, generator=generator).repeat(rows_per_update // rows + 2)
    order = order[: count * rows_per_update]
    noise = 1 + 0.2 * torch.rand(len(order), generator=generator)  # so the same rows do not always meet
    updates = order[(lengths[order] * noise).argsort(stable=True)].view(count, rows_per_update)
    return updates[torch.randperm(count, generator=generator)]


def cut_answers(starts, lengths, generator):
    """Where an epoch cuts each row, (N,): of eleven answers one at its start and five at a random token.

    A running verdict is about an unfinished answer, so the guard has to see such answers in training.
    """
    share = (2.2 * torch.rand(len(lengths), generator=generator) - 0.2).clamp(0, 1)
    return starts + ((lengths - starts) * share).ceil().long()


def split_windows(ids, context):
    """A text as it is, or if it exceeds the context, in windows of WINDOW tokens that overlap by half."""
    if len(ids) <= context:
        return [ids]
    size = min(context, WINDOW)
    return [ids[start : start + size] for start in range(0, len(ids) - size // 2, size - size // 2)]
