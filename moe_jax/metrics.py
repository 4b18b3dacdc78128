"""What a run leaves behind to be read: metrics.jsonl, TensorBoard events, config.json and run.json."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax import starts
from moe_jax.errors import UserError
from moe_jax.event_file import outlast

PACKAGES = ("moe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Writer:
    """Metrics of a run, one JSON object a line in metrics.jsonl, and as TensorBoard events.

    A row is {"step": 10, "train/loss": 2.5, ...}. It is on disk when `write` returns. Floats are written in full;
    NaN and infinities, which JSON does not have, as the strings "nan", "inf" and "-inf", which float() reads back.

    Args:
      resume_step: the step of the restored checkpoint; rows and events after it, which the run is about to repeat, are
        removed. 0 = a fresh start: all are.
      evaluates_again: the run repeats the evaluation of that step too, so its row is removed.
      tensorboard: also write events, to workdir/tensorboard.
      active: False makes every method do nothing (all processes but process 0).
    """

    def __init__(
        self, workdir: Any, *, resume_step: int, tensorboard: bool, active: bool, evaluates_again: bool = False
    ):
        self._rows, self._events = None, None
        if not active:
            return
        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_rows(path, resume_step, evaluates_again)
        self._rows = path.open("a", encoding="utf-8")
        if tensorboard:
            self._events = _events(Path(workdir) / "tensorboard", resume_step)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """One row: scalars are numbers or arrays without dimensions, by tags such as "train/loss"."""
        if self._rows is None:
            return
        row = {name: np.asarray(value).item() for name, value in scalars.items()}
        text = json.dumps({"step": int(step)} | {k: _json(v) for k, v in row.items()}) + "\n"
        try:
            self._rows.write(text)
            self._rows.flush()
        except OSError as error:
            raise UserError(f"{self._rows.name} cannot be written: {error.strerror}; what was saved stays") from None
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Any) -> None:
        """A picture of values [n], one bar each (the load of every expert): bar i spans i - 1/2 to i + 1/2."""
        if self._events is None:
            return
        heights = np.asarray(values, np.float64)
        place = np.arange(len(heights))
        self._events.add_histogram_raw(
            name,
            min=-0.5,
            max=len(heights) - 0.5,
            num=heights.sum(),
            sum=(heights * place).sum(),
            sum_squares=(heights * place**2).sum(),
            bucket_limits=(place + 0.5).tolist(),
            bucket_counts=heights.tolist(),
            global_step=step,
        )

    def text(self, step: int, name: str, text: str) -> None:
        """Markdown, such as a sample of the model (indent or fence what is to be shown as it is)."""
        if self._events is not None:
            self._events.add_text(name, text, step)

    def image(self, step: int, name: str, array: Any) -> None:
        """An image [H, W] or [H, W, 3], uint8 or float in [0, 1]."""
        if self._events is not None:
            pixels = np.asarray(array)
            self._events.add_image(name, pixels, step, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        for file in (self._rows, self._events):
            if file is not None:
                with contextlib.suppress(OSError):  # a row that could not be written, which `write` told
                    file.close()
        self._rows, self._events = None, None


def read_rows(path: Any) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that are no row (a kill can tear the last one) are left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def write_run_info(workdir: Any, config: Mapping[str, Any], *, mesh: Mapping[str, int], active: bool) -> None:
    """Writes config.json, and appends a record of this start to run.json, so that a resumed run keeps its history.

    A run.json that cannot be read (a full disk empties files) begins anew.

    Args:
      config: the resolved config, a nested dict of JSON values.
      mesh: axis name -> length.
      active: False does nothing (all processes but process 0).

    The record has: versions, the git commit of the source (null when it has none; "dirty" = with changes), the devices,
    the mesh, the command line, the host and the time of the start (UTC).
    """
    if not active:
        return
    directory = Path(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / "config.json", config)
    runs = directory / "run.json"
    history = starts.read(workdir)
    devices = jax.devices()
    record = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "host": platform.node(),
        "processes": jax.process_count(),
        "devices": {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)},
        "mesh": dict(mesh),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).parent),
    }
    _replace(runs, [*history, record])


def git_state(source: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the repository that tracks `source`; None without one, or without git."""

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        # without optional locks, a look at the repository never disturbs a commit that is under way
        options = ("--no-optional-locks", "-C", str(source))
        return subprocess.run(["git", *options, *command], capture_output=True, text=True, timeout=30, check=False)

    try:
        # an installed copy may lie inside a repository that has nothing to do with it
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if commit.returncode else {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def _keep_rows(path: Path, resume_step: int, evaluates_again: bool) -> None:
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if resume_step > 0 and row["step"] <= resume_step]
    if evaluates_again:
        rows = [row for row in rows if row["step"] < resume_step or not any(name.startswith("eval/") for name in row)]
    _replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _events(directory: Path, resume_step: int) -> Any:
    from tensorboardX import SummaryWriter  # here: its import takes a while, and not every run wants events

    directory.mkdir(parents=True, exist_ok=True)
    number = len(list(directory.iterdir()))  # two starts within a second would share a file and lose the first's events
    purge = resume_step + 1 if resume_step > 0 else 0
    suffix = f".{number:06d}"
    return outlast(SummaryWriter(str(directory), purge_step=purge, flush_secs=10, filename_suffix=suffix))


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # moe_jax run from its source tree: the git commit says more


def _replace(path: Path, content: Any) -> None:
    _replace_text(path, json.dumps(content, indent=1) + "\n")


def _replace_text(path: Path, text: str) -> None:
    """Writes a file in one atomic step: a kill leaves the old content or the new."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
