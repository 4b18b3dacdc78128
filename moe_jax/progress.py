"""What the person in front of the terminal sees of a run: a live line, or plain lines where there is no terminal."""

import statistics
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

WINDOW = 50  # updates that the speed is taken over
FIRST = 3  # updates that are always printed as plain lines
QUIET = 10.0  # seconds between plain lines after them
NARROW = 90  # columns of a terminal, below which the bar gives way to the numbers


class Progress:
    """Shows step, loss, speed, expert balance and the time left; counts the speed also when it shows nothing.

    Args:
      total_steps: the step that the run ends at.
      start_step: the step that it starts from (a resumed run: the restored step).
      tokens_per_step: over all devices.
      active: False shows nothing (all processes but process 0).
      console: where to; None = standard output.
    """

    def __init__(
        self, total_steps: int, start_step: int, tokens_per_step: int, *, active: bool, console: Console | None = None
    ):
        self._total, self._step, self._tokens_per_step = total_steps, start_step, tokens_per_step
        self._seconds: deque[float] = deque(maxlen=WINDOW)  # per step, of the last updates
        self._first: tuple[float, int] | None = None  # time and step of the first update: before it is compilation
        self._last = time.monotonic()
        self._console = (console or Console()) if active else None
        self._updates, self._printed = 0, -QUIET
        self._bar: Bar | None = None
        if self._console and self._console.is_terminal:
            step, text = TextColumn("step {task.completed:.0f}/{task.total:.0f}"), TextColumn("{task.fields[text]}")
            bar = [BarColumn(24)] if self._console.width >= NARROW else []
            self._bar = Bar(step, *bar, text, console=self._console)
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, text="compiling")
            self._bar.start()

    @property
    def tokens_per_second(self) -> float:
        """Of the median step among the last updates: neither compilation nor an evaluation counts. 0 = not known."""
        return self._tokens_per_step / statistics.median(self._seconds) if self._seconds else 0.0

    def update(self, step: int, *, loss: float, balance: float | None) -> None:
        """After a step, or every few. `balance`: load of the busiest expert over the mean; None = no experts."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, step
        elif step > self._step:
            self._seconds.append((now - self._last) / (step - self._step))
        self._last, self._step, self._updates = now, step, self._updates + 1
        if not self._console:
            return
        text = self._text(loss, balance)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif self._updates <= FIRST or now - self._printed >= QUIET or step >= self._total:
            self._printed = now
            self._console.print(f"step {step}/{self._total}  {text}", highlight=False, soft_wrap=True)

    def message(self, text: str) -> None:
        """Prints a text above the live line."""
        if self._console:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last line standing; safe to call twice."""
        if self._bar:
            self._bar.stop()

    def _text(self, loss: float, balance: float | None) -> str:
        parts = [f"loss {loss:.4f}"]
        if self._seconds:
            parts.append(f"{readable(self.tokens_per_second)} tokens/s")
        if balance is not None:
            parts.append(f"busiest expert {balance:.2f}x")
        return "  ".join([*parts, *self._left()])

    def _left(self) -> list[str]:
        """The time left, from all that passed since the first update: evaluations and saves will come again."""
        if self._first is None or self._step <= self._first[1] or self._step >= self._total:
            return []
        per_step = (self._last - self._first[0]) / (self._step - self._first[1])
        return [f"{duration(per_step * (self._total - self._step))} left"]


def readable(number: float) -> str:
    """1234 -> "1.23k": three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
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
