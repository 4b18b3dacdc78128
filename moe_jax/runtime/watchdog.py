"""Ends a process whose main thread is stuck: a collective that waits for ever, a file system that
hangs.

The main thread gives a sign of life at every step. A thread looks at the time of the last one.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from moe_jax import exit_codes
from moe_jax.runtime import cluster, signals
from moe_jax.runtime.stacks import STACKS

# Looked at this often: a stuck process ends within its limit and one of these.
INTERVAL = 0.25  # seconds
FIRST_STEP = "everything up to the first step"


class Watchdog:
    """Watches the main thread from `start` to `stop`.

    Three limits, in seconds; 0 = never:

        step    without a sign of life while steps are made
        other   inside one `slow` activity: a compilation, an evaluation, a save
        grace   without a sign of life after a signal, outside of such an activity: a process that
                hangs cannot save
    """

    def __init__(self) -> None:
        # Set when the thread that watches has to end; each start has its own.
        self._stopped = threading.Event()
        self._limits = {"step": 0.0, "other": 0.0, "grace": 0.0}
        # time.monotonic() of the last sign of life.
        self._alive = 0.0
        # Slow ones under way, the innermost last.
        self._activities: list[str] = []

    def start(self, *, step: float, other: float, grace: float, stacks: Path) -> None:
        """Begins to watch. The stacks of all threads go to the file `stacks` before an end."""
        self._limits = {"step": step, "other": other, "grace": grace}
        self._stopped = threading.Event()
        STACKS.keep_in(stacks)
        self._activities = [FIRST_STEP]
        self.alive()
        arguments = (self._stopped,)
        threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def step_done(self) -> None:
        """Takes note that the first step was compiled, or another one done."""
        if FIRST_STEP in self._activities:
            self._activities.remove(FIRST_STEP)
        self.alive()

    def alive(self) -> None:
        """Takes note that the main thread moves; to be called after every step and every batch."""
        self._alive = time.monotonic()

    @contextlib.contextmanager
    def slow(self, activity: str) -> Iterator[None]:
        """Allows more time for what is done inside: the limit is `other`."""
        self._activities.append(activity)
        self.alive()
        try:
            yield
        finally:
            self._activities.remove(activity)
            self.alive()

    def _watch(self, stopped: threading.Event) -> None:
        heard_at = 0.0
        while not stopped.wait(INTERVAL):
            now = time.monotonic()
            silent = now - self._alive
            activity = self._activities[-1] if self._activities else ""
            limit = self._limits["other" if activity else "step"]
            if limit and silent > limit and not stopped.is_set():
                key = "limits.other" if activity else "limits.step"
                what = f"{activity} has taken" if activity else "no step has been done for"
                self._end(exit_codes.RETRY, f"{what} {silent:.0f} s ({key} = {limit:g})")
            if not signals.LISTENER.number:
                heard_at = 0.0
                continue
            heard_at = heard_at or now
            # Since the signal, or since the last sign of life after it.
            waited = now - max(heard_at, self._alive)
            grace = self._limits["grace"]
            # A save may take longer than that: nothing hangs in an activity that is known.
            if grace and waited > grace and not (activity or stopped.is_set()):
                self._end(
                    128 + signals.LISTENER.number,
                    f"told to end, and nothing has moved for {waited:.0f} s "
                    f"(limits.grace = {grace:g}): ended unsaved",
                )

    def _end(self, code: int, reason: str) -> None:
        reason += STACKS.write(reason)
        cluster.PEERS.end(code, reason, f"{signals.LISTENER.process}{reason}", is_stuck=True)


WATCHDOG = Watchdog()
