"""What the commands share. Each test names the mutations that it kills."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest

import errors
from errors import UserError, check_output, one_line, printable, write_whole


@pytest.fixture
def status(monkeypatch):
    """The exit status of a command whose main raises this, or prints these words."""

    def status(result):
        def main():
            if isinstance(result, BaseException):
                raise result
            print(result)

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # pytest's cannot be reconfigured
        with pytest.raises(SystemExit) as left:
            errors.run(main)
        return left.value.code

    return status


LONG = "tensor \x1b[2J\x07evil\tx\u202e" + "y" * 10_000 + "\nsecond line"


@pytest.mark.parametrize("error", [UserError(LONG), OSError(LONG), PermissionError(13, "denied", "my.csv")])
def test_a_users_mistake_is_one_short_printable_line(error, status, capsys):
    """Kills: a traceback, status 1, a stranger's file quoted raw or whole, no word on which file it was."""
    assert status(error) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.endswith("\n") and shown.err[:-1].isprintable()
    assert ("tensor [2Jevil x" if error.args[0] == LONG else "denied: 'my.csv'") in shown.err[:600]
    assert len(shown.err) < 1000


@pytest.mark.parametrize("error", [ValueError("a"), RuntimeError("a"), KeyError("a")])
def test_a_fault_of_the_program_keeps_its_traceback(error, status):
    """Kills: a net so wide that it hides faults as if they were a user's."""
    with pytest.raises(type(error)):
        status(error)


def test_a_command_that_is_stopped_says_nothing(status, capsys, tmp_path, monkeypatch):
    """Kills: a traceback or another status for Ctrl-C or a reader that left, a complaint at Python's exit."""
    assert status(KeyboardInterrupt()) == 130
    with open(tmp_path / "pipe", "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert status(BrokenPipeError()) == 1
        pipe.write("what was still in the buffer")
    assert (tmp_path / "pipe").read_text() == "" and capsys.readouterr().err == ""


def test_a_disk_that_is_full_at_the_end_is_told(status, monkeypatch, capsys):
    """Kills: text that is lost in a buffer at exit, with exit status 0."""
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"))
    monkeypatch.setattr(sys, "stdout", full)
    assert status("the last words") == 2 and "No space left" in capsys.readouterr().err
    full.detach().close()


def test_an_error_without_words_is_told_by_its_kind():
    """Kills: an empty line for an error, an index into no lines."""
    assert one_line(UserError()) == one_line(UserError(" \n")) == "UserError"
    assert one_line(UserError("\n  first\tline\nsecond")) == "first line"


def test_printable_keeps_text_and_drops_what_moves_a_terminal():
    """Kills: letters, accents, joined emoji or line breaks lost, a control or direction character kept."""
    kept = "a b\n\tc e\u0301 สวัสดี 日本語 👩\u200d🚀 🇹🇭 \u0646\u200c\u0627"
    assert printable(kept) == kept
    dropped = "\x00\x07\x08\x0b\x0c\r\x1b\x7f\x80\x9b\xad\u200b\u200e\u202a\u202e\u2066\u2069\ufeff"
    assert printable(f"a{dropped}b") == "ab"


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch):
    """Kills: an hour of work whose result has no place, a pipe or folder that a file replaces."""
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    Path("locked").mkdir(mode=0o555)
    Path("file.json").write_text("old")
    os.mkfifo("pipe.json")
    bad = ["missing/a.json", "folder.json", "pipe.json", "file.json/a.json", "a.jsonl", "a", "/dev/stdout"]
    for name in bad if os.geteuid() == 0 else [*bad, "locked/a.json"]:
        with pytest.raises(UserError) as error:
            check_output(Path(name), ".json", ".csv")
        assert name in str(error.value) and "\n" not in str(error.value)
    for name in ("a.json", "a.csv", "file.json", "folder.json/a.csv", "../a.json"):
        check_output(Path(name), ".json", ".csv")
    check_output(Path("a"))
    assert Path("file.json").read_text() == "old" and not Path("a.json").exists()


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """Kills: writing in place, half of a file, one left behind, a link replaced, a line without the file."""
    target, link = tmp_path / "target", tmp_path / "link"
    write_whole(target, b"old")
    link.symlink_to("target")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(errors.os, "fsync", full)
        for path in (target, link, tmp_path / "new"):
            with pytest.raises(OSError, match=r"No space left on device: '.*/(target|new)'$"):
                write_whole(path, b"new content")
    assert target.read_bytes() == b"old" and {*tmp_path.iterdir()} == {target, link}
    write_whole(link, b"new content")
    assert link.is_symlink() and target.read_bytes() == b"new content"
    assert {*tmp_path.iterdir()} == {target, link}
