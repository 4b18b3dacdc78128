"""Goodput: the share of a run's time that went into steps which count, over all its restarts.

The rest is told by what it was spent on: the start, the compilation, evaluations, saves, waiting
for data, and steps that a restart had to make again. The word is Google's (ML Productivity
Goodput, 2024). workdir/goodput.json keeps the seconds of every start.
"""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "goodput.json"
STEPS = "steps"
REDONE = "steps made again after a restart"


class Goodput:
    """Counts the seconds of this start of a run, each to one activity.

    Args:
      started: time.monotonic() when the process began.
      first: what it is doing from there on, until `phase` says something else.
    """

    def __init__(self, started: float, first: str = "start"):
        self._seconds: defaultdict[str, float] = defaultdict(float)
        # What is under way; the innermost last, to which the time belongs.
        self._activities = [first]
        self._since = started
        # The starts before this one.
        self._earlier: list[dict[str, Any]] = []
        self._file: Path | None = None
        self._began, self._first_step = time.time(), 0

    def open(self, workdir: Path, step: int) -> None:
        """Goes on with the file of a run that starts from `step`. For process 0 alone."""
        self._file, self._first_step = workdir / FILE, step
        try:
            starts = json.loads(self._file.read_text(encoding="utf-8"))["starts"]
        except (OSError, ValueError, KeyError, TypeError):
            # There is no file, or a full disk has emptied it.
            starts = []
        self._earlier = [_cut(start, step) for start in starts] if step else []

    def phase(self, activity: str) -> None:
        """Gives the time from here on to an activity, but for that inside of `doing`."""
        self._pass()
        self._activities[0] = activity

    @contextlib.contextmanager
    def doing(self, activity: str) -> Iterator[None]:
        """Gives the time inside to an activity, without that of activities inside it."""
        self._pass()
        self._activities.append(activity)
        try:
            yield
        finally:
            self._pass()
            self._activities.pop()

    def write(self, step: int) -> None:
        """Writes the seconds so far; `step` is done."""
        if self._file is None:
            return
        # In one atomic step, so that a kill leaves the old file or the new one.
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps({"starts": [*self._earlier, self._own(step)]}, indent=1))
        part.replace(self._file)

    def seconds(self, step: int) -> dict[str, float]:
        """Returns the seconds of every activity over all starts of the run; `step` is done."""
        total: defaultdict[str, float] = defaultdict(float)
        for start in [*self._earlier, self._own(step)]:
            # Steps that this start made, and those of them that no later start had to make again.
            made, kept = start["last_step"] - start["first_step"], start["kept_steps"]
            for name, value in start["seconds"].items():
                total[name] += value
            if made > kept:
                # The steps of a start are taken to be equally long.
                redone = start["seconds"].get(STEPS, 0.0) * (1 - kept / made)
                total[STEPS] -= redone
                total[REDONE] += redone
        return {name: value for name, value in total.items() if value}

    def share(self, step: int) -> float:
        """Returns the goodput, from 0 to 1."""
        seconds = self.seconds(step)
        return seconds.get(STEPS, 0.0) / max(sum(seconds.values()), 1e-9)

    def text(self, step: int) -> str:
        """Returns the goodput in words: its share, and the largest of what the rest went into."""
        seconds = self.seconds(step)
        whole = max(sum(seconds.values()), 1e-9)
        rest = sorted(((v, name) for name, v in seconds.items() if name != STEPS), reverse=True)
        parts = [f"{name} {value / whole:.0%}" for value, name in rest[:5] if value > 0.005 * whole]
        starts = len(self._earlier) + 1
        over = f" over {starts} starts" if starts > 1 else ""
        return ", ".join([f"{self.share(step):.0%} of the time in steps{over}", *parts])

    def _own(self, step: int) -> dict[str, Any]:
        self._pass()
        return {
            "began": self._began,
            "wrote": time.time(),
            "first_step": self._first_step,
            "last_step": step,
            "kept_steps": step - self._first_step,
            "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
        }

    def _pass(self) -> None:
        """Gives the time since the last call to the activity under way."""
        now = time.monotonic()
        self._seconds[self._activities[-1]] += now - self._since
        self._since = now


def _cut(start: dict[str, Any], step: int) -> dict[str, Any]:
    """Returns an earlier start of a run that now goes on from `step`: what it made after that is
    made again.
    """
    # What an earlier restart has taken away does not come back.
    kept = min(start["first_step"] + start["kept_steps"], step) - start["first_step"]
    return {**start, "kept_steps": max(kept, 0)}
