"""Rows of labelled text, from files or the hub, and their splits and labels.

A row has
    prompt      text
    response    text; without it the prompt alone is judged
    category    {name: bool}; without it only the unsafe output learns from the row
    is_safe     bool; without it a row is safe if no category is true
as in BeaverTails (Ji et al., arXiv 2307.04657). Instead of prompt and response a row may have
    messages    [{"role", "content"}, ...]; its last turn is judged in the light of those before
tools/convert.py writes such rows from the columns and files of other data sets.
"""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from pyarrow.parquet import ParquetFile

from chat import CONVERT, NAMES, conversation, encode
from errors import UserError, explain, from_json, one_line, refuse, refuse_twins, without_twins

BEAVERTAILS = "PKU-Alignment/BeaverTails"
KINDS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
WORDS = {  # in a file's name that choose its split, as in the datasets library
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
SPLITS = tuple(WORDS)
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
LABELS |= dict.fromkeys(("", "none", "nan", "null"))


def read_rows(sources):
    """Yield (name, split, checked rows) of each file in `sources`, or of each split of a hub id."""
    first = Path(sources[0])
    is_hub = len(sources) == 1 and not first.exists() and not first.name.lower().endswith(KINDS)
    for name, part, rows in read_hub(sources[0]) if is_hub else read_files(sources):
        words = re.findall("[a-z]+", part.lower())
        splits = [split for split, names in WORDS.items() if names & {*words}] or ["train"]
        refuse(len(splits) > 1, f"the name of {name} has the words of several splits: {', '.join(splits)}")
        yield name, splits[0], [check_row(row, where) for where, row in rows]


def read_hub(name):
    """Yield (name, split, rows with their places) of a data set on the hub."""
    import datasets  # slow to import, and seldom needed

    advice = "without a network give files, such as --dataset train.jsonl test.jsonl"
    with explain(f"cannot load the data set {name!r}; {advice}"):
        splits = datasets.load_dataset(name)
    for split in splits:
        if "330k" not in split:  # BeaverTails comes in two sizes; the paper's is the 30k one
            rows = ((f"{name} {split}, row {n}", row) for n, row in enumerate(splits[split], 1))
            yield f"{name} {split}", split, rows


def read_files(sources):
    """Yield (name, file name, rows with their places) of each file."""
    paths = [check_input(Path(source)) for source in sources]
    for path in paths:
        yield str(path), path.name, read_file(path, NAMES)


def check_input(path):
    """Return the path of a file of rows. Raises UserError for any other path."""
    known = path.is_file() and path.name.lower().endswith(KINDS)
    kinds = ", ".join(KINDS)
    refuse(
        not known, f"{path} is not a {kinds} file that is there; tools/convert.py reads others and folders"
    )
    return path


def read_file(path, columns=None):
    """Yield (where, row), one at a time. A UserError stands for a row that cannot be read.

    columns: which to read of a Parquet file, so that a damaged one that nobody needs costs nothing.
    """
    name = path.name.lower()
    place = "the start"
    try:
        with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as file:
            # A byte that is not UTF-8 becomes half of a surrogate pair, which `conversation` refuses.
            lines = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            if name.endswith(".parquet"):
                rows = parquet_rows(file, columns)
            else:
                rows = csv_rows(lines) if name.endswith(".csv") else json_rows(lines)
            for place, row in rows:
                yield f"{path}, {place}", row
    except Exception as error:  # what came before has been yielded
        yield f"{path}, after {place}", UserError(f"the file cannot be read on ({one_line(error)})")


def json_rows(lines):
    """Yield (place, row) of JSON Lines."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=without_twins)
            except (ValueError, RecursionError) as error:
                row = UserError(f"cannot be read as JSON ({one_line(error)})")
            yield f"line {number}", row


def csv_rows(lines):
    """Yield (place, row) of a table with a header and commas between its cells."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, strict=True)
    names = next(reader, [])
    refuse_twins(names)
    while True:
        try:
            for cells in reader:
                if len(cells) == len(names):
                    yield f"line {reader.line_num}", dict(zip(names, cells, strict=True))
                elif cells:
                    message = f"{len(cells)} cells for {len(names)} columns"
                    yield f"line {reader.line_num}", UserError(message)
            return
        except csv.Error as error:  # such as a stray quote; it costs this row alone
            yield f"line {reader.line_num}", UserError(f"cannot be read as CSV ({one_line(error)})")


def parquet_rows(file, columns):
    """Yield (place, row) of a Parquet file."""
    table = ParquetFile(file)
    names = table.schema_arrow.names
    refuse_twins(names)
    columns = [name for name in names if columns is None or name.strip().lower().startswith(columns)]
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=columns):
        for n in range(len(batch)):
            number += 1
            try:
                (row,) = batch.slice(n, 1).to_pylist()
            except Exception as error:  # of one odd cell
                row = UserError(f"cannot be read ({one_line(error)})")
            yield f"row {number}", row


# ---------------------------------------------------------------- checking


def check_row(row, where):
    """A row with its `category` and `is_safe`. Raises UserError, which names the place, for wrong values."""
    with at(where):
        refuse(isinstance(row, UserError), row)
        conversation(row)
        category = from_json(row.get("category")) or {}
        refuse(not isinstance(category, dict), "`category` must be an object of name: true or false")
        labels = {name: truth(value, f"category {name!r}") for name, value in category.items()}
        category = {name: label for name, label in labels.items() if label is not None}
        is_safe = truth(row.get("is_safe"), "`is_safe`")
        refuse(is_safe and any(category.values()), "`is_safe` is true, but a `category` is too")
        if is_safe is None:
            refuse(not category, f"a row needs `is_safe` (true or false) or a `category`; {CONVERT}")
            is_safe = not any(category.values())
    return row | {"category": category, "is_safe": is_safe}


def truth(value, name):
    """A label as tables write it -> True, False or None, which is unknown."""
    word = str(value).strip().lower()
    refuse(word not in LABELS, f"{name} is {value!r}, not true or false; {CONVERT}")
    return LABELS[word]


def encode_row(tokenizer, row, where=None):
    """encode() of a row. Raises UserError, which names the place or shows the row."""
    with at(where or f"the row {str(row)[:100]}"):
        refuse(isinstance(row, UserError), row)
        return encode(tokenizer, conversation(row))


@contextlib.contextmanager
def at(where):
    """Put the place of a row in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


# ---------------------------------------------------------------- splits and labels


class Rows(NamedTuple):
    """What load_splits makes of files."""

    splits: dict[str, list[dict]]  # rows of "train", "validation" and "test"
    categories: list[str]  # those that can be learnt
    notes: list[str]  # what was done with which rows, for the user


def load_splits(sources) -> Rows:
    """The rows of all sources in three splits.

    Each missing split takes a tenth of the training prompts. A prompt stays in one split. If the files give
    it to several, test keeps it, then validation.
    Raises UserError for data that cannot be learnt from.
    """
    splits = {split: [] for split in SPLITS}
    notes = []
    for name, split, rows in read_rows(sources):
        notes.append(f"{split}: {len(rows)} rows of {name}")
        refuse(not rows, f"{name} has no rows")
        splits[split] += rows
    missing = [split for split in SPLITS if not splits[split]]
    taken = set()
    for split in reversed(SPLITS):
        rows = [row for row in splits[split] if prompt_key(row) not in taken]
        left_out = len(splits[split]) - len(rows)
        if left_out:
            notes.append(f"left out {left_out} {split} rows: their prompts are in another split")
        taken |= {prompt_key(row) for row in rows}
        splits[split] = rows
    split_of_tenth = missing + ["train"] * 10  # each missing split takes a tenth of the prompts
    rows, splits["train"] = splits["train"], []
    for row in rows:
        splits[split_of_tenth[tenth_of(row)]].append(row)
    notes += [f"{split}: {len(splits[split])} of these rows, cut by prompt" for split in missing]
    for split in ("train", "validation"):
        rows = splits[split]
        found = f"the {split} split has {len(rows)} rows with prompts of their own"
        one_kind = len({row["is_safe"] for row in rows}) < 2
        refuse(one_kind, f"{found}, and needs safe and unsafe ones; give more rows, or a file for it")
    # A category that training never shows both ways would get one probability for every text.
    names = dict.fromkeys(name for split in SPLITS for row in splits[split] for name in row["category"])
    shown = {(name, value) for row in splits["train"] for name, value in row["category"].items()}
    learnable = [name for name in names if {(name, True), (name, False)} <= shown]
    odd = ", ".join(name for name in names if name not in learnable)
    notes += [f"no output for categories that training does not show true and false: {odd}"] if odd else []
    return Rows(splits, learnable, notes)


def prompt_key(row):
    """All that the user says in a row. Rows with the same key share a prompt."""
    texts = [m["content"].strip() for m in conversation(row) if m["role"] == "user"]
    return "\0".join(texts).lower()


def tenth_of(row):
    """Which tenth of all prompts, 0 to 9, a row belongs to. No seed and no order of rows changes it."""
    return int(hashlib.sha256(prompt_key(row).encode()).hexdigest(), 16) % 10


def labels(rows, names):
    """Targets (N, 1 + K), fp32: unsafe, then the categories; NaN where unknown."""
    values = [[not row["is_safe"], *(row["category"].get(name, math.nan) for name in names)] for row in rows]
    return torch.tensor(values, dtype=torch.float32).view(len(rows), 1 + len(names))
