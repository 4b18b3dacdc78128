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

from moe_jax.runtime.clock import StepClock
from moe_jax.runtime.goodput import STEPS, Goodput
from moe_jax.runtime.watchdog import WATCHDOG
from moe_jax.terminal import live_line
from moe_jax.terminal.live_line import one_line
from moe_jax.terminal.units import duration, readable

# Updates that are always printed as plain lines.
FIRST = 3
# Seconds between plain lines after them.
QUIET = 10.0
# Seconds: an activity that took less is not announced again in a plain line.
SHORT = 2.0
# Seconds without a step, after which the live line says how long it has been.
STILL = 5.0
# Columns of a terminal, below which the bar gives way to the numbers.
NARROW = 90
# Columns of the bar.
BAR = 24
FIRST_STEP = "compiling the first step"


class Progress:
    """Shows what a run does: before its steps one activity after another, then step, loss, speed
    and the time left.

    In a terminal it is one live line, drawn by a thread, with a sign that turns and the seconds of
    what takes long; elsewhere it is plain lines.

    Args:
      active: False shows nothing (all processes but process 0).
      console: where to; None = standard output.
      goodput: counts the seconds of every activity; None = nobody does.
    """

    def __init__(
        self, *, active: bool, console: Console | None = None, goodput: Goodput | None = None
    ):
        self.goodput = goodput or Goodput(time.monotonic())
        self.console = (console or Console()) if active else None
        self._is_live = bool(self.console and live_line.can_be_shown(self.console))
        self._live: Live | None = None
        self._clock: StepClock | None = None
        self._total = self._step = self._updates = 0
        # Of the last update.
        self._text = ""
        # Time and step of the first update: before it is compilation.
        self._first: tuple[float, int] | None = None
        # When a plain line of the steps was last printed.
        self._printed = -QUIET
        # When a step was last done, or an activity was over.
        self._moved = time.monotonic()
        # What is under way, and since when; the innermost last.
        self._activities: list[tuple[str, float]] = []
        # Seconds of each activity, the last time.
        self._took: dict[str, float] = {}

    def start(self, start_step: int, total_steps: int, clock: StepClock) -> None:
        """Begins with the steps after `start_step`, if there are any; `clock` stands still during
        every activity from here on.
        """
        self._step, self._total, self._clock = start_step, total_steps, clock
        if start_step >= total_steps:
            return
        self._begin(FIRST_STEP)
        self.goodput.phase(FIRST_STEP)
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
            with paused, WATCHDOG.slow(activity), self.goodput.doing(activity):
                yield
        finally:
            self._end()
            if opened:
                self._shut()

    def stepped(self, step: int) -> None:
        """Moves the number in the live line: a step is done."""
        if step > self._step:
            self._step, self._moved = step, time.monotonic()

    def update(self, step: int, *, loss: float, balance: float | None) -> None:
        """Shows the figures of a logged step.

        `balance`: load of the busiest expert over the mean; None = no experts.
        """
        # Before anything is shown: processes that show nothing keep the speed too.
        if self._clock:
            self._clock.row(step)
        now = time.monotonic()
        if self._first is None:
            self._first = now, step
            # The first step is compiled.
            self._activities.clear()
            self.goodput.phase(STEPS)
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
        # The first time is announced: nobody knows how long it will take.
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
        assert self.console
        self._live = live_line.opened(self.console, self._line, transient=transient)
        return True

    def _shut(self) -> None:
        # None first, so that the line that is left has no sign that turns.
        live, self._live = self._live, None
        if live:
            live.stop()

    def _line(self) -> RenderableType:
        """Returns one line, never wider than the terminal. Called by a thread, which must import
        nothing.
        """
        assert self.console
        now = time.monotonic()
        turning = "" if self._live is None else live_line.spinner()
        step = f"step {self._step}/{self._total}  " if self._clock else ""
        happening = self._happening(now)
        if not self._clock or self.console.width < NARROW:
            return one_line(turning + step + happening)
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True)
        line.add_column(width=BAR)
        line.add_column(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=max(self._total, 1), completed=self._step, width=BAR)
        line.add_row(turning + step.strip(), bar, one_line(happening))
        return line

    def _happening(self, now: float) -> str:
        """Returns an activity and its seconds, else the figures of the last logged step."""
        # A copy: the run may end its activity while this thread looks.
        for activity, begun in self._activities[-1:]:
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
        """Returns the time left, from all that passed since the first update: evaluations and saves
        will come again.
        """
        if self._first is None:
            return []
        first_time, first_step = self._first
        if not first_step < self._step < self._total:
            return []
        per_step = (now - first_time) / (self._step - first_step)
        return [f"{duration(per_step * (self._total - self._step))} left"]
