"""What a command says while it works, on standard error, so that its results on standard output
stay clean.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from moe_jax.terminal import live_line
from moe_jax.terminal.units import duration

# Seconds between two plain lines.
QUIET = 10.0

Tell = Callable[[str], None]


def silent(text: str) -> None:
    """Takes what is told, for whoever works without a command that listens."""
    del text


@contextlib.contextmanager
def shown(command: str, *, active: bool = True) -> Iterator[Tell]:
    """Yields a function that is told what is being done now.

    A terminal shows it in a live line, with the time since the beginning, and it is gone at the
    end. A file or a pipe gets plain lines: the first that is told at once, then at most one every
    QUIET seconds. `active` False says nothing (other processes).

    Print results after the block has ended, not within it.
    """
    console = Console(stderr=True)
    if not active:
        yield silent
    elif live_line.can_be_shown(console):
        with _live(command, console) as tell:
            yield tell
    else:
        yield _plain(command)


@contextlib.contextmanager
def _live(command: str, console: Console) -> Iterator[Tell]:
    begun = time.monotonic()
    activity = command

    def tell(text: str) -> None:
        nonlocal activity
        activity = f"{command}: {text}"

    def draw() -> Text:
        took = duration(time.monotonic() - begun)
        return live_line.one_line(f"{live_line.spinner()}{activity}  {took}")

    # Standard output may be a file: what is printed there must not be drawn above the line instead.
    live = live_line.opened(console, draw, transient=True, redirect_stdout=False)
    try:
        yield tell
    finally:
        live.stop()


def _plain(command: str) -> Tell:
    last = -math.inf

    def tell(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= QUIET:
            last = now
            print(f"{command}: {text}", file=sys.stderr, flush=True)

    return tell
