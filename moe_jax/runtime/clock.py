"""The time of training steps alone: what else a run does (evaluation, saving, samples, pictures) is
taken out.
"""

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

# Logged rows that the speed is the median of.
WINDOW = 50


class StepClock:
    """Times the steps of a run between its logged rows.

    The first row starts the time, so that whatever comes before it (compilation) is in none.

    Args:
      tokens_per_step: over all devices.
      step_flops: useful FLOPs of a step, over all devices.
      peak: FLOP/s of all devices; an attribute, to be set before the first row.
    """

    def __init__(self, tokens_per_step: int, step_flops: int = 0, peak: float = math.nan):
        self._tokens_per_step, self._step_flops, self.peak = tokens_per_step, step_flops, peak
        # Seconds of a step, one number for each row.
        self._per_step: deque[float] = deque(maxlen=WINDOW)
        # When the last row was, and its step.
        self._row: tuple[float, int] | None = None
        # Seconds since the last row.
        self._paused = self._waited = 0.0
        # How many pauses are open, one inside the other.
        self._depth = 0
        self._input_wait: float | None = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the time inside out.

        No step may be under way when it begins. A pause inside a pause counts once.
        """
        self._depth += 1
        begun = time.monotonic()
        try:
            yield
        finally:
            self._depth -= 1
            # A pause inside another one is already in the time of that.
            if not self._depth:
                self._paused += time.monotonic() - begun

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as a wait for data: a part of the time of the steps."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    def row(self, step: int) -> None:
        """Takes the time since the last logged row; to be called at each, when `step` is done."""
        now = time.monotonic()
        if self._row is not None and step > self._row[1]:
            # The bound keeps a clock that did not move from dividing by 0.
            seconds = max(now - self._row[0] - self._paused, 1e-9)
            self._per_step.append(seconds / (step - self._row[1]))
            self._input_wait = min(self._waited / seconds, 1.0)
        self._row, self._paused, self._waited = (now, step), 0.0, 0.0

    @property
    def tokens_per_second(self) -> float:
        """Returns the speed of the median row among the last ones. 0 = not known before the second
        row.
        """
        return self._tokens_per_step / statistics.median(self._per_step) if self._per_step else 0.0

    def figures(self) -> dict[str, Any]:
        """Returns the perf/... figures of the row; those of speed only when it is known."""
        found = {"perf/peak_flops": self.peak}
        if not self._per_step:
            return found
        speed = self.tokens_per_second
        flops_per_second = speed / self._tokens_per_step * self._step_flops
        found |= {"perf/tokens_per_second": speed, "perf/input_wait": self._input_wait}
        # FLOP/s that were useful, over those that the devices have: MFU.
        found |= {"perf/tflops": flops_per_second / 1e12, "perf/mfu": flops_per_second / self.peak}
        return found
