"""Small things that the commands share."""

import contextlib
import os
import sys
from pathlib import Path


class UserError(ValueError):
    """A mistake in what the user gave; the commands print it as one line and leave with exit status 2."""


def run(main):
    """Run a command: what the user got wrong becomes one line on standard error and exit status 2."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  Python has none where the caller closed it
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has left, as `head` does; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"{sys.argv[0]}: {one_line(str(error))[:2000]}", file=sys.stderr)
        sys.exit(2)


def first_line(error):
    """An error of another library, cut to what fits a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def one_line(text):
    """The text with spaces for what would break a line or move a terminal's cursor: it may quote a stranger's file."""
    return "".join(c if c.isprintable() else " " for c in text)


def write_whole(path, content):
    """Write bytes so that `path` holds the old content or the new, never a part: written aside, flushed, renamed.

    Raises UserError where that cannot be done, as on a full disk.
    """
    aside = Path(f"{path}.{os.getpid()}.tmp")  # its own for each process, for two may write the same file
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; an older file there is whole") from error
