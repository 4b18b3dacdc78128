"""The loop of a run: what is due after a step, and which steps are under way."""

import contextlib
import json
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import checkpoint
from moe_jax.runtime import stopping
from moe_jax.schema.config import Config

# Steps queued on the devices; more than a few deadlock simulated CPU devices.
IN_FLIGHT = {"cpu": 2, "gpu": 8, "tpu": 8}


class Calendar(NamedTuple):
    """Holds what is due after a step: each condition stands here, and nowhere else.

    `done` counts the steps that are finished, from 1.
    """

    cfg: Config
    saves: checkpoint.Checkpoints
    # The step from which this process goes on.
    start: int
    # The step after which the run ends.
    last: int

    def logs(self, done: int) -> bool:
        first, last = done == self.start + 1, done == self.last
        return done % self.cfg.log.every == 0 or first or last

    def evaluates(self, done: int) -> bool:
        every = self.cfg.eval.every
        return done == self.last or (every > 0 and done % every == 0)

    def saves_state(self, done: int) -> bool:
        return done == self.last or self.saves.due(done)

    def records_routing(self, done: int) -> bool:
        return self.cfg.record.steps(done)

    def measures_interference(self, done: int) -> bool:
        every = self.cfg.log.interference_every
        return every > 0 and done % every == 0

    def notes_load(self, done: int) -> bool:
        return done % self.cfg.log.histogram_every == 0


class InFlight:
    """Steps that were handed to the devices, and whose values nobody has looked at yet."""

    def __init__(self, cfg: Config, names: list[str], saves: checkpoint.Checkpoints):
        self._cfg, self._names, self._saves = cfg, names, saves
        self._steps: deque[tuple[int, dict[str, Any]]] = deque()
        self._most = IN_FLIGHT.get(jax.default_backend(), 8)

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Takes a step that was begun. Waits for the oldest one when there are many."""
        self._steps.append((step, values))
        # The host may be ahead of the devices, but only by so many steps.
        if len(self._steps) >= self._most:
            self._wait()

    def wait_for_all(self) -> None:
        """Waits for every step: nothing is evaluated or saved before it is known to be finite."""
        while self._steps:
            self._wait()

    def _wait(self) -> None:
        """Waits for a step. Raises NonFinite when too many in a row were not finite."""
        step, values = self._steps.popleft()
        # To read a value is to wait for its step.
        skipped, patience = int(values["skipped"]), self._cfg.train.nonfinite_patience
        if skipped <= patience:
            return
        finite = np.asarray(values["finite_leaves"])
        parameter = stopping.first_broken(self._names, finite)
        self._dump(step, values, finite)
        # Named in the message: it is what the next start goes on from.
        good = self._saves.latest()
        where = "no checkpoint yet"
        if good is not None:
            where = f"last good checkpoint: step {good} in {self._saves.directory}"
        raise stopping.NonFinite(
            f"step {step}: loss {float(values['loss'])}, gradient norm "
            f"{float(values['grad_norm'])}: not finite {skipped} time(s) in a row "
            f"(train.nonfinite_patience = {patience}); the gradient of {parameter} went wrong "
            f"first; {where}"
        )

    def _dump(self, step: int, values: dict[str, Any], finite: np.ndarray) -> None:
        """Writes which gradients were not finite to nonfinite.json of the workdir."""
        if jax.process_index() > 0:
            return
        broken = [name for name, ok in zip(self._names, finite, strict=True) if not ok]
        found = {
            "step": step,
            "loss": str(float(values["loss"])),
            "grad_norm": str(float(values["grad_norm"])),
            "parameters_with_a_gradient_that_is_not_finite": broken,
        }
        path = Path(self._saves.directory).parent / "nonfinite.json"
        # The run ends by the reason, not by this file.
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
