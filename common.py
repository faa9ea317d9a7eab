"""What the commands share: errors as one line, rows from files, files that appear whole, common arguments."""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import sys
import unicodedata
from pathlib import Path

from pyarrow.parquet import ParquetFile

DTYPES = ("float32", "bfloat16", "float16")
HUB_CONFIGS = {"lmsys/toxic-chat": "toxicchat0124", "allenai/wildguardmix": "wildguardtrain"}  # which to load
TABLES = (".csv", ".tsv")
SUFFIXES = (".jsonl", ".ndjson", ".json", *TABLES, ".parquet")
BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # tested first: it begins with UTF-16's
BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


class UserError(ValueError):
    """A mistake in what the user gave. A command prints it as one line and exits with status 2."""


def refuse(condition, message):
    """Raise UserError with this message if the condition holds."""
    if condition:
        raise UserError(message)


@contextlib.contextmanager
def explain(what, kinds=Exception):
    """Turn exceptions of these kinds into a UserError that says what could not be done."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what} ({one_line(error)[:200]})") from error


def run(main):
    """Run a command. A user's mistake becomes one line on standard error."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  Python has none if the caller closed it
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console may not know all characters
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader left, as `head` does; without this, Python complains again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"{sys.argv[0]}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error):
    """The first line of an error, printable and cut short: it may quote a stranger's file."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return printable(line.replace("\t", " "))[:500]


def printable(text):
    """The text without characters that could move a terminal's cursor, recolour it or reorder it."""
    return "".join(c for c in text if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf"))


def suffix(path):
    """The kind of a file, in small letters: ".jsonl" of rows.JSONL.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def files_of(folder):
    """The files of a folder that can be read. The others are named."""
    files = sorted(folder.iterdir())
    if odd := [file.name for file in files if suffix(file) not in SUFFIXES]:
        print(one_line(f"{folder}: not read: {', '.join(odd)}"), file=sys.stderr)
    return [file for file in files if file.name not in odd]


def read_hub(name):
    import datasets  # slow to import, and seldom needed

    advice = "without a network give files, such as --dataset train.jsonl test.jsonl"
    with explain(f"cannot load the data set {name!r}; {advice}"):
        splits = datasets.load_dataset(name, HUB_CONFIGS.get(name))
    # BeaverTails comes in two sizes; the paper's is the 30k one.
    for split in [split for split in splits if "330k" not in split]:
        part = f"{name} {split}"
        yield part, split, ((f"{part}, row {n}", row) for n, row in enumerate(splits[split], 1))


def read_file(path):
    """Yield (where, row), one at a time. A line that cannot be read has a UserError as its row.

    Raises UserError for a file that is damaged.
    """
    with explain(f"cannot read {path}"):
        if suffix(path) == ".parquet":
            batches = ParquetFile(path).iter_batches(batch_size=256)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path}, row {n}", row) for n, row in enumerate(rows, 1))
            return
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            rows = (table_rows if suffix(path) in TABLES else json_rows)(text_lines(file))
            yield from ((f"{path}, {place}", row) for place, row in rows)


def text_lines(file):
    """The lines of a binary file, in UTF-8 (wrong bytes: surrogates) or as its byte-order mark says."""
    encoding = next((name for bom, name in BOMS.items() if file.peek(4).startswith(bom)), None)
    errors = "strict" if encoding else "surrogateescape"
    return io.TextIOWrapper(file, encoding or "utf-8-sig", errors, newline="")


def json_rows(lines):
    """Yield (place, row) of JSON Lines, or of one JSON array."""
    filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(filled, (0, ""))
    if first[1].lstrip().startswith("["):
        rows = json.loads(first[1] + "".join(lines))
        yield from ((f"row {n}", row) for n, row in enumerate(rows, 1))
        return
    for number, line in itertools.chain([first] if first[0] else [], filled):
        try:
            yield f"line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", UserError(f"not JSON ({one_line(error)})")


def table_rows(lines):
    """Yield (place, row) of a table with a header, whose cells are between commas, semicolons or tabs."""
    header = next(lines, "")
    csv.field_size_limit(2**31 - 1)
    delimiter = max(",;\t", key=header.count)  # not in the header: one column, whose text may have commas
    delimiter = delimiter if delimiter in header else "\0"
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    columns = next(reader, [])
    if len(set(columns)) < len(columns):
        raise ValueError("two columns have the same name")
    for number, cells in enumerate(filter(None, reader), 1):
        if len(cells) == len(columns):
            row = dict(zip(columns, cells, strict=True))
        else:
            row = UserError(f"there are {len(cells)} cells for {len(columns)} columns")
        yield f"row {number}", row


def write_whole(path, content):
    """Write bytes so that `path` holds the old file or the new one, never a part of it."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def lock(path):
    """Open a file to append to. Raises UserError if another process has it open in this way."""
    file = open(path, "ab")  # noqa: SIM115
    with contextlib.suppress(ImportError):  # Windows has none
        import fcntl

        with explain(f"another process is writing {path}", BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def write_json(path, content):
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def to_json(value):
    """JSON in one line, with null for NaN, which other languages cannot read, and dates as text."""
    return json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None))


def add_guard_arguments(parser):
    """The arguments of moderate.py and evaluate.py that say which guard to use; returns add_argument."""
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="default: the guard in guard/")
    add("adapter", nargs="?", type=Path, help="default: adapter.safetensors beside the config")
    add("--device-id", type=int, help="number of the GPU, -1 for the CPU; default: GPU 0 if there is one")
    either = parser.add_mutually_exclusive_group().add_argument
    flag = "flag prompts and answers at or above this probability; above 1: never"
    either("--threshold", type=float, help=flag)
    rate = "take the thresholds with at most this false positive rate on validation"
    either("--max-fpr", type=float, help=rate)
    add("--base-model", help="where the chat model is, if it is not where the config says")
    add(
        "--dtype",
        choices=DTYPES,
        help="compute in this; default: as stored, or what is faster for many tokens",
    )
    return add
