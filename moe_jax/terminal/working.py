"""What a command says while it works, on standard error, so that its results on standard output
stay clean.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

QUIET = 10.0  # seconds between two plain lines

Tell = Callable[[str], None]


def silent(text: str) -> None:
    """For whoever works without a command that listens."""
    del text


@contextlib.contextmanager
def shown(what: str, *, active: bool = True) -> Iterator[Tell]:
    """Yields a function that is told what is being done now.

    A terminal shows it beside a spinner and the time since the beginning, and it is gone at the
    end. A file or a pipe gets plain lines: the first that is told at once, then at most one every
    QUIET seconds. `active` False says nothing (other processes).

    Print results after the block has ended, not within it.
    """
    console = Console(stderr=True)
    if not active:
        yield silent
    elif console.is_terminal:
        with _spinner(console) as bar:
            task = bar.add_task(what, total=None)
            yield lambda text: bar.update(task, description=f"{what}: {text}")
    else:
        yield _lines(what)


def _spinner(console: Console) -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    # Standard output may be a file: what is printed there must not be drawn above the spinner
    # instead.
    return Progress(*columns, console=console, transient=True, redirect_stdout=False)


def _lines(what: str) -> Tell:
    last = -math.inf

    def tell(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= QUIET:
            last = now
            print(f"{what}: {text}", file=sys.stderr, flush=True)

    return tell
