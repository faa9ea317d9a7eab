"""What the commands share. Each test names the mutations that it kills."""

import io
import sys

import pytest

import common
from common import UserError, one_line, printable


def status(main):
    """The exit status of a command whose main does this."""
    with pytest.raises((SystemExit, KeyboardInterrupt)) as left:
        common.run(main)
    return getattr(left.value, "code", None)


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("kind", [UserError, OSError])
def test_a_users_mistake_is_one_short_printable_line(kind, capsys):
    """Kills: a traceback, exit status 1, a stranger's file quoted as it stands or at full length."""
    assert status(raises(kind("tensor evil\n\x1b[2Jx\u202e" + "y" * 10_000))) == 2
    assert status(raises(kind("tensor \x1b[2J\x07evil\tx\u202e" + "y" * 10_000))) == 2
    shown = capsys.readouterr()
    first, second = shown.err.splitlines()
    assert first.endswith("tensor evil") and "tensor [2Jevil x" in second
    assert first.isprintable() and second.isprintable() and len(second) < 1000 and shown.out == ""


def test_a_fault_of_the_program_keeps_its_traceback():
    """Kills: a net so wide that it hides faults as if they were a user's."""
    for error in (ValueError("a"), RuntimeError("a"), KeyError("a")):
        with pytest.raises(type(error)):
            common.run(raises(error))


def test_ctrl_c_ends_a_command_without_words(capsys):
    """Kills: a traceback for Ctrl-C, exit status 0 or 1 for it."""
    assert status(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


def test_a_disk_that_is_full_at_the_end_is_told(monkeypatch, capsys):
    """Kills: text that is lost in a buffer at exit, with exit status 0."""

    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert status(lambda: None) == 2
    assert "No space left" in capsys.readouterr().err


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
