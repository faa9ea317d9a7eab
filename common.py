"""What the commands share: errors as one line, files that appear whole, the arguments that name a guard."""

import json
import os
import sys
import unicodedata
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave. A command prints it as one line and exits with status 2."""


def refuse(condition, message):
    """Raise UserError with this message if the condition holds."""
    if condition:
        raise UserError(message)


@contextmanager
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


def write_json(path, content):
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def to_json(value):
    """JSON in one line, with null for NaN, which other languages cannot read, and dates as text."""
    return json.dumps(json.loads(json.dumps(value, default=str), parse_constant=lambda _: None))


def add_guard_arguments(parser):
    """The arguments of moderate.py and evaluate.py that say which guard to use; returns add_argument."""
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="default: the guard in guard/, or the newest run of train.py")
    add("adapter", nargs="?", type=Path, help="default: adapter.safetensors beside the config")
    add("--device-id", type=int, help="number of the GPU, -1 for the CPU; default: GPU 0 if there is one")
    add(
        "--threshold",
        type=float,
        help="flag prompts and answers at or above this probability; above 1: never",
    )
    return add
