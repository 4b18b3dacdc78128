"""What a command shows while it works: a live line in a terminal, plain lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from moe_jax.terminal import live_line, working


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 40 columns in the place of standard error."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, color_system=None)
    monkeypatch.setattr(working, "Console", lambda stderr: console)
    return out


def test_a_terminal_has_one_line_with_a_sign_and_the_time(terminal, monkeypatch):
    drawn = []
    opened = live_line.opened

    def listen(console, draw, **options):
        drawn.append(draw)
        return opened(console, draw, **options)

    monkeypatch.setattr(live_line, "opened", listen)
    with working.shown("verify") as tell:
        (draw,) = drawn
        assert draw().plain[0] in live_line.SPINNER
        assert re.fullmatch(r" verify  \d+s", draw().plain[1:])
        tell("one device")
        assert re.fullmatch(r" verify: one device  \d+s", draw().plain[1:])
        tell("a long name " * 9)
    lines = terminal.getvalue().splitlines()
    assert "verify" in lines[0]


def test_a_terminal_that_cannot_draw_gets_plain_lines(terminal, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    with working.shown("verify") as tell:
        tell("one device")
    assert capsys.readouterr().err == "verify: one device\n" and terminal.getvalue() == ""


def test_what_a_command_does_is_told_in_lines_without_a_terminal(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 12.0, 13.0])
    monkeypatch.setattr(working.time, "monotonic", lambda: next(clock))
    with working.shown("replay") as tell:
        for text in ("batch 1", "batch 2", "batch 3", "batch 4"):
            tell(text)
    captured = capsys.readouterr()
    assert captured.err == "replay: batch 1\nreplay: batch 3\n" and captured.out == ""
    with working.shown("replay", active=False) as tell:
        tell("nothing")
    assert capsys.readouterr().err == ""
