"""The line that a terminal shows while something goes on: the same for runs and for commands."""

import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

# In ASCII, which every terminal shows.
SPINNER = "-\\|/"
# Times a second.
REFRESH = 5


def can_be_shown(console: Console) -> bool:
    """Returns whether a console can draw over a line. A file, a pipe and TERM=dumb cannot."""
    return console.is_terminal and not console.is_dumb_terminal


def opened(
    console: Console,
    draw: Callable[[], RenderableType],
    *,
    transient: bool,
    redirect_stdout: bool = True,
) -> Live:
    """Returns a live line that a thread draws, until its `stop()`.

    Args:
      draw: returns the line. It is called by the thread, so it must import nothing.
      transient: the line is gone at the end.
      redirect_stdout: what is printed in the meantime stands above the line.
    """
    live = Live(
        get_renderable=draw,
        console=console,
        refresh_per_second=REFRESH,
        transient=transient,
        redirect_stdout=redirect_stdout,
    )
    live.start()
    # rich hides the cursor, and a process that is killed could not bring it back.
    console.show_cursor(True)
    return live


def spinner() -> str:
    """Returns the sign that stands for this moment, and a space."""
    return SPINNER[int(time.monotonic() * REFRESH) % len(SPINNER)] + " "


def one_line(text: str) -> Text:
    """Returns a text that ends in "…" where the terminal is too narrow."""
    return Text(text, no_wrap=True, overflow="ellipsis")
