"""What the person in front of the terminal sees of a run: a live line, or plain lines where there
is no terminal.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_jax.runtime.clock import StepClock
from moe_jax.runtime.watchdog import WATCHDOG

FIRST = 3  # updates that are always printed as plain lines
QUIET = 10.0  # seconds between plain lines after them
SHORT = 2.0  # seconds: an activity that took less is not announced again in a plain line
STILL = 5.0  # seconds without a step, after which the live line says how long it has been
NARROW = 90  # columns of a terminal, below which the bar gives way to the numbers
BAR = 24  # columns of the bar
SPINNER = "-\\|/"  # in ASCII, which every terminal shows
FIRST_STEP = "compiling the first step"


class Progress:
    """Shows what a run does: before its steps one activity after another, then step, loss, speed
    and the time left.

    In a terminal it is one live line, drawn by a thread, with a sign that turns and the seconds of
    what takes long; elsewhere it is plain lines.

    Args:
      active: False shows nothing (all processes but process 0).
      console: where to; None = standard output.
    """

    def __init__(self, *, active: bool, console: Console | None = None):
        self.console = (console or Console()) if active else None
        self._is_live = bool(
            self.console and self.console.is_terminal and not self.console.is_dumb_terminal
        )
        self._live: Live | None = None
        self._clock: StepClock | None = None
        self._total = self._step = self._updates = 0
        self._text = ""  # of the last update
        self._first: tuple[float, int] | None = (
            None  # time and step of the first update: before it is compilation
        )
        self._printed = -QUIET
        self._moved = time.monotonic()  # when a step was last done, or an activity was over
        self._activities: list[
            tuple[str, float]
        ] = []  # under way, and since when; the innermost last
        self._took: dict[str, float] = {}  # seconds of each activity, the last time

    def start(self, start_step: int, total_steps: int, clock: StepClock) -> None:
        """Begins with the steps after `start_step`, if there are any; `clock` stands still during
        every activity from here on.
        """
        self._step, self._total, self._clock = start_step, total_steps, clock
        if start_step >= total_steps:
            return
        self._begin(FIRST_STEP)
        self._open(transient=False)

    @contextlib.contextmanager
    def doing(self, activity: str, after: Any = None) -> Iterator[None]:
        """Shows an activity beside the steps while it lasts, and takes its time out of that of the
        steps.

        `after`: arrays of the last step, which is waited for first: it belongs to the time of the
        steps.
        """
        jax.block_until_ready(after)
        opened = self._live is None and self._open(transient=True)
        self._begin(activity)
        try:
            paused = self._clock.paused() if self._clock else contextlib.nullcontext()
            with paused, WATCHDOG.slow(activity):
                yield
        finally:
            self._end()
            if opened:
                self._shut()

    def stepped(self, step: int) -> None:
        """A step is done: only its number moves, in the live line."""
        if step > self._step:
            self._step, self._moved = step, time.monotonic()

    def update(self, step: int, *, loss: float, balance: float | None) -> None:
        """After each logged step.

        `balance`: load of the busiest expert over the mean; None = no experts.
        """
        if self._clock:
            self._clock.row(step)
        now = time.monotonic()
        if self._first is None:
            self._first = now, step
            self._activities.clear()  # the first step is compiled
        self._step, self._updates, self._moved = step, self._updates + 1, now
        if not self.console:
            return
        self._text = self._describe(loss, balance, now)
        due = self._updates <= FIRST or now - self._printed >= QUIET or step >= self._total
        if due and not self._is_live:
            self._printed = now
            self._print(f"step {step}/{self._total}  {self._text}")

    def message(self, text: str) -> None:
        """Prints a text above the live line."""
        self._print(text)

    def close(self) -> None:
        """Leaves the last line standing; safe to call twice."""
        self._activities.clear()
        self._moved = time.monotonic()
        self._shut()

    # Activities

    def _begin(self, activity: str) -> None:
        self._activities.append((activity, time.monotonic()))
        if not self._is_live and self._took.get(activity, SHORT) >= SHORT:
            self._print(f"step {self._step}: {activity}" if self._first else activity)

    def _end(self) -> None:
        self._moved = time.monotonic()
        if self._activities:
            activity, begun = self._activities.pop()
            self._took[activity] = self._moved - begun

    # The live line

    def _open(self, transient: bool) -> bool:
        if not self._is_live:
            return False
        live = Live(
            get_renderable=self._line,
            console=self.console,
            refresh_per_second=5,
            transient=transient,
        )
        live.start()
        assert self.console
        self.console.show_cursor(
            True
        )  # rich hides it, and a process that is killed could not bring it back
        self._live = live
        return True

    def _shut(self) -> None:
        live, self._live = self._live, None  # so that the line that is left has no sign that turns
        if live:
            live.stop()

    def _line(self) -> RenderableType:
        """One line, never wider than the terminal. Drawn by a thread, which must import nothing."""
        assert self.console
        now = time.monotonic()
        turning = "" if self._live is None else SPINNER[int(now * 5) % len(SPINNER)] + " "
        step = f"step {self._step}/{self._total}  " if self._clock else ""
        text = Text(self._happening(now), no_wrap=True, overflow="ellipsis")
        if not self._clock or self.console.width < NARROW:
            return Text(turning + step, no_wrap=True, overflow="ellipsis").append_text(text)
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(width=BAR)
        line.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=BAR)
        line.add_row(turning + step.strip(), bar, text)
        return line

    def _happening(self, now: float) -> str:
        """An activity and its seconds, else the figures of the last logged step."""
        under_way = self._activities[-1:]
        for activity, begun in under_way:
            return f"{activity}  {duration(now - begun)}"
        if now - self._moved < STILL:
            return self._text
        return f"{duration(now - self._moved)} in this step  {self._text}"

    # Text

    def _print(self, text: str) -> None:
        if self.console:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _describe(self, loss: float, balance: float | None, now: float) -> str:
        parts = [f"loss {loss:.4f}"]
        if self._clock and self._clock.tokens_per_second:
            parts.append(f"{readable(self._clock.tokens_per_second)} tokens/s")
        if balance is not None:
            parts.append(f"busiest expert {balance:.2f}x")
        return "  ".join([*parts, *self._left(now)])

    def _left(self, now: float) -> list[str]:
        """The time left, from all that passed since the first update: evaluations and saves will
        come again.
        """
        if self._first is None or self._step <= self._first[1] or self._step >= self._total:
            return []
        per_step = (now - self._first[0]) / (self._step - self._first[1])
        return [f"{duration(per_step * (self._total - self._step))} left"]


def readable(number: float) -> str:
    """1234 -> "1.23k": three digits."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """75 -> "1m 15s", 7300 -> "2h 01m", 200000 -> "2d 07h"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
