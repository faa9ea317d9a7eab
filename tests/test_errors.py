"""What the commands share. Each test names the mutations that it kills."""

import errno
import io
import os
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

import errors
from errors import UserError, check_output, one_line, printable, write_whole

LONG = "tensor \x1b[2J\x07evil\tx\u202e" + "y" * 10_000 + "\nsecond line"


def status(main):
    """The exit status of a command."""
    with patch("sys.stdin"), pytest.raises(SystemExit) as left:  # pytest's own cannot be reconfigured
        errors.run(main)
    return left.value.code


@pytest.mark.parametrize("error", [UserError(LONG), OSError(LONG)])
def test_a_users_mistake_is_one_short_printable_line(error, capsys):
    """Kills: a traceback, status 1, a stranger's file quoted raw or whole, an empty line."""
    assert status(Mock(side_effect=error)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "tensor [2Jevil x" in shown.err and len(shown.err) < 1000
    assert shown.err.endswith("\n") and shown.err[:-1].isprintable()
    assert one_line(type(error)(" \n")) == type(error).__name__


def test_a_fault_of_the_program_keeps_its_traceback_and_ctrl_c_says_nothing(capsys):
    """Kills: a net so wide that it hides faults as if they were a user's, a traceback for Ctrl-C."""
    with pytest.raises(ValueError, match="a fault"):
        status(Mock(side_effect=ValueError("a fault")))
    assert status(Mock(side_effect=KeyboardInterrupt)) == 130
    assert capsys.readouterr().err == ""


def test_a_disk_that_is_full_at_the_end_is_told(monkeypatch, capsys):
    """Kills: text that is lost in a buffer at exit, with exit status 0."""
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"))
    monkeypatch.setattr(sys, "stdout", full)
    assert status(lambda: print("the last words")) == 2
    assert "No space left" in capsys.readouterr().err
    full.detach().close()


def test_printable_keeps_text_and_drops_what_moves_a_terminal():
    """Kills: letters, accents, joined emoji or line breaks lost, a control or direction character kept."""
    kept = "a b\n\tc e\u0301 สวัสดี 日本語 👩\u200d🚀 \u0646\u200c\u0627"
    assert printable(f"{kept}\x00\x07\x1b\r\x9b\u202e\u2066\ufeff") == kept


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    """Kills: an hour of work whose result has no place, a pipe or folder that a file replaces."""
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    Path("file.json").write_text("old")
    os.mkfifo("pipe.json")
    for name in ("missing/a.json", "folder.json", "pipe.json", "file.json/a.json", "a.jsonl"):
        with pytest.raises(UserError, match=name):
            check_output(Path(name), ".json", ".csv")
    assert Path("file.json").read_text() == "old"


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """Kills: writing in place, half of a file, one left behind, a link replaced, a line without the file."""
    target, link = tmp_path / "target", tmp_path / "link"
    write_whole(target, b"old")
    link.symlink_to("target")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        for path in (link, tmp_path / "new"):
            with pytest.raises(OSError, match=r"No space left on device: '.*/(target|new)'$"):
                write_whole(path, b"new content")
    assert target.read_bytes() == b"old" and {*tmp_path.iterdir()} == {target, link}
    write_whole(link, b"new content")
    assert link.is_symlink() and target.read_bytes() == b"new content"
