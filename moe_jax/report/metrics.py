"""Writes the records of a run: metrics.jsonl, TensorBoard events, config.json and run.json."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.report.tensorboard import Events
from moe_jax.report.trackers import Trackers
from moe_jax.runtime import starts
from moe_jax.version import source

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class PerStep(NamedTuple):
    """Holds what one step of the run takes, over all devices."""

    # Places of its batch, padding included: what tokens/s counts.
    tokens: int
    # Useful FLOPs (plan/flops).
    flops: int


class Writer:
    """Metrics of a run, one JSON object a line in metrics.jsonl, and as TensorBoard events.

    A row is {"step": 10, "seconds": 12.5, "tokens": 20480, "flops": 123, "train/loss": 2.5, ...}.
    It is on disk when `write` returns. Floats are written in full; NaN and infinities, which JSON
    does not have, as the strings "nan", "inf" and "-inf", which float() reads back.

    Args:
      resume_step: the step of the restored checkpoint; rows and events after it, which the run is
          about to repeat, are removed. 0 = a fresh start: all are.
      evaluates_again: the run repeats the evaluation of that step too, so its row is removed.
      tensorboard: also write events, to workdir/tensorboard.
      active: False makes every method do nothing (all processes but process 0).
      started: time.monotonic() when this process began. "seconds" go on from those of the last row
          that is kept.
      per_step: of which "tokens" and "flops" of a row are the sums over its steps.
      trackers: services that get every row too (log.trackers); None = none.
    """

    def __init__(
        self,
        workdir: Any,
        *,
        resume_step: int,
        tensorboard: bool,
        active: bool,
        started: float,
        per_step: PerStep,
        evaluates_again: bool = False,
        trackers: Trackers | None = None,
    ):
        self._rows, self._events = None, None
        self._trackers = trackers
        if not active:
            return
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _keep_rows(path, resume_step, evaluates_again)
        # As if the process had begun so much earlier: a pause between starts counts for nothing.
        self._started, self._per_step = started - _seconds(kept), per_step
        self._rows = path.open("a", encoding="utf-8")
        if tensorboard:
            self._events = Events(Path(workdir) / "tensorboard", resume_step)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes a row; scalars are numbers or arrays without dimensions, by tag ("train/loss")."""
        if self._rows is None:
            return
        row: dict[str, Any] = {
            "step": int(step),
            "seconds": round(time.monotonic() - self._started, 3),
            # Of the whole run, so that a restart goes on counting.
            "tokens": int(step) * self._per_step.tokens,
            "flops": int(step) * self._per_step.flops,
        }
        # Waits for the devices, if these have not come so far.
        numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
        row |= {name: _json(number) for name, number in numbers.items()}
        try:
            self._rows.write(json.dumps(row) + "\n")
            # A run that is killed has lost no row.
            self._rows.flush()
        except OSError as error:
            raise UserError(
                f"{self._rows.name} cannot be written: {error.strerror}; what was saved stays"
            ) from None
        if self._events:
            self._events.scalars(step, numbers)
        if self._trackers:
            self._trackers.scalars(step, {**row, **numbers})

    def text(self, step: int, name: str, text: str) -> None:
        """Writes Markdown, such as a sample; indent or fence what is to be shown as it is."""
        if self._events:
            self._events.text(step, name, text)

    def image(self, step: int, name: str, array: Any) -> None:
        """Writes an image [H, W] or [H, W, 3], uint8 or float in [0, 1]."""
        if self._events:
            self._events.image(step, name, array)

    def hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Writes what TensorBoard tells this run from others by: numbers, strings, booleans."""
        if self._events:
            self._events.hyperparameters(values)

    def write_final(self, step: int, scalars: Mapping[str, Any], compared: Iterable[str]) -> None:
        """Writes the row of the last evaluation; by the figures `compared` TensorBoard puts the run
        beside others.
        """
        self.write(step, scalars)
        if self._events:
            self._events.finished(compared)

    @property
    def shows_images(self) -> bool:
        return self._events is not None

    def close(self) -> None:
        for file in (self._rows, self._events):
            if file is not None:
                # A row that could not be written: `write` has told it.
                with contextlib.suppress(OSError):
                    file.close()
        self._rows, self._events = None, None
        if self._trackers:
            self._trackers.close()
            self._trackers = None


def read_rows(path: Any) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; lines that are no row (a kill can tear the last one) are
    left out.
    """
    rows = []
    # "replace": a kill can tear a letter of several bytes too.
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def write_run_info(
    workdir: Any, config: Mapping[str, Any], *, mesh: Mapping[str, int], active: bool
) -> None:
    """Writes config.json, and appends a record of this start to run.json, so that a resumed run
    keeps its history.

    A run.json that cannot be read (a full disk empties files) begins anew.

    Args:
      config: the resolved config, a nested dict of JSON values.
      mesh: axis name -> length.
      active: False does nothing (all processes but process 0).

    The record has: versions, the git commit of the source (null when it is not known; "dirty" =
    with changes), the devices, the mesh, the command line, the host and the time of the start
    (UTC).
    """
    if not active:
        return
    directory = Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / "config.json", config)
    history = starts.read(workdir)
    devices, code = jax.devices(), source()
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    start = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "host": platform.node(),
        "processes": jax.process_count(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
        },
        "mesh": dict(mesh),
        "versions": {"python": platform.python_version(), "moe_jax": code.version} | packages,
        "git": {"commit": code.commit, "dirty": code.dirty} if code.commit else None,
    }
    _replace(directory / "run.json", [*history, start])


def _keep_rows(path: Path, resume_step: int, evaluates_again: bool) -> list[dict[str, Any]]:
    """Returns the rows up to the restored step, and leaves these alone in the file."""
    if not path.exists():
        return []

    def stays(row: Mapping[str, Any]) -> bool:
        # The row of the step itself stays: the run does not make it again.
        if evaluates_again and row["step"] == resume_step:
            return not any(name.startswith("eval/") for name in row)
        return row["step"] <= resume_step

    # A fresh start keeps none, whatever an earlier run left here.
    rows = [row for row in read_rows(path) if stays(row)] if resume_step > 0 else []
    _replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds of the last row that has them; 0 for a run that began before rows had
    any.
    """
    return max((float(row["seconds"]) for row in rows if "seconds" in row), default=0.0)


def _json(value: Any) -> Any:
    """Returns a value as a row has it."""
    # JSON has no NaN and no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, content: Any) -> None:
    """Writes JSON in one atomic step."""
    _replace_text(path, json.dumps(content, indent=1) + "\n")


def _replace_text(path: Path, text: str) -> None:
    """Writes a file in one atomic step: a kill leaves the old content or the new."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
