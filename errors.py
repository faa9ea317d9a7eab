"""What the commands share: a user's mistake as one line, arguments, text for a terminal, whole files."""

import contextlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


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
    sys.stdin.reconfigure(errors="surrogateescape")  # `conversation` refuses what is not UTF-8
    sys.stdout.reconfigure(errors="replace")  # a console may not know all characters
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
    words = str(error).strip() or type(error).__name__
    return printable(words.splitlines()[0].replace("\t", " "))[:500]


def printable(text):
    """The text without characters that could move a terminal's cursor, recolour it or reorder it."""
    harmless = "\n\t\u200c\u200d"
    kept = (c for c in text if c in harmless or unicodedata.category(c) not in ("Cc", "Cf"))
    return "".join(kept)


def undisguised(text):
    """The text in Unicode's form NFKC without format characters (Cf), if that changes its ASCII words."""
    visible = "".join(c for c in text if unicodedata.category(c) != "Cf")
    plain = unicodedata.normalize("NFKC", visible)
    has_same_words = re.findall("[A-Za-z]+", text) == re.findall("[A-Za-z]+", plain)
    return text if has_same_words else plain


def to_json(value):
    """JSON in one line, with null for NaN, which other languages cannot read, and dates as text."""
    with_nan = json.dumps(value, default=str)
    return json.dumps(json.loads(with_nan, parse_constant=lambda _: None))


def refuse_twins(names):
    """Raise UserError for a name that comes twice: which one is meant?"""
    twins = [name for name, count in Counter(names).items() if count > 1]
    refuse(twins, f"{', '.join(twins)} comes twice")


def without_twins(pairs):
    """A dict of (name, value) pairs. Raises UserError for a name that comes twice."""
    refuse_twins(name for name, _ in pairs)
    return dict(pairs)


def from_json(value):
    """An object as it is, or from the JSON that the cell of a table holds."""
    if not isinstance(value, str):
        return value
    with explain("`messages` and `category` must be JSON"):
        return json.loads(value, object_pairs_hook=without_twins) if value.strip() else None


def json_line(row):
    """The bytes of a row in a JSON Lines file."""
    return (to_json(row) + "\n").encode()


def number(kind, above, at_most=sys.float_info.max):
    """A converter for argparse: int or float, finite and within these bounds."""

    def number_in_bounds(text):
        value = kind(text)
        if not above < value <= at_most:
            raise ValueError
        return value

    return number_in_bounds


def guard_arguments(parser):
    """Add the arguments that say which guard to use; `guard_of` loads it. Returns add_argument."""
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="default: the guard in guard/")
    add("adapter", nargs="?", type=Path, help="default: adapter.safetensors beside the config")
    add("--device-id", type=int, help="number of the GPU, -1 for the CPU; default: GPU 0 if there is one")
    either = parser.add_mutually_exclusive_group().add_argument
    flag = "flag prompts and answers at or above this probability; above 1: never"
    either("--threshold", type=float, help=flag)
    rate = "take the thresholds with at most this false positive rate on validation"
    either("--max-fpr", type=float, help=rate)
    every = "tokens between two verdicts on a text; 0: one verdict, at its end"
    add("--verdict-every", type=number(int, -1), metavar="N", help=every)
    add("--base-model", help="where the chat model is, if it is not where the config says")
    dtype = "compute in this; default: as stored, or what is faster for many tokens"
    add("--dtype", choices=DTYPES, help=dtype)
    return add


def check_output(path, *suffixes, inputs=()):
    """Raise UserError now if a file could not be written at the end. suffixes: how its name may end."""
    ends = " or ".join(suffixes)
    refuse(suffixes and path.suffix not in suffixes, f"the name of {path} must end in {ends}")
    refuse(path.exists() and not path.is_file(), f"{path} is there and is not a file")
    for name in inputs:
        overwrites = path.exists() and Path(name).exists() and path.samefile(name)
        refuse(overwrites, f"writing {path} would destroy its input; name another file")
    folder = path.resolve().parent
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    refuse(not writable, f"cannot write {path}: no folder {folder} to write in")


def write_whole(path, content):
    """Write bytes so that `path` holds the old file or the new one, never a part of it."""
    path = Path(path).resolve()  # a link stays a link
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path, content):
    """Write an object as indented JSON, whole."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
