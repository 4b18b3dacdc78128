"""The checkpoints of one run.

The only file that imports orbax (v1, whose names still move between releases).
"""

import json
import logging
import math
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from moe_jax.checkpoint import alias, folder, manifest
from moe_jax.checkpoint import flat as flat_lib
from moe_jax.errors import NoCheckpoint, UserError

log = logging.getLogger(__name__)


class SaveFailed(UserError, RuntimeError):
    """A checkpoint could not be written; the text says which, and why."""


class Checkpoints:
    """Saves, finds and restores the states of one run.

    All processes of the run make the same calls in the same order.

    Args:
      directory: where the checkpoints are; one that all processes see.
      every: steps between checkpoints, see `due`; 0 = never.
      keep: the last n are kept, at least 1.
      keep_best: and the n with the lowest scores.

    Nothing is created or deleted before the first `save`, so a reader may open the directory of a
    running job.
    """

    def __init__(self, directory: Any, *, every: int, keep: int, keep_best: int):
        self.directory = Path(directory).absolute()
        alias.check(self.directory)
        self.every, self.keep, self.keep_best = every, max(keep, 1), keep_best
        self._here: set[int] = set()  # steps that this object saved or restored
        self._sound: set[int] = set()  # steps whose files are known to be right
        self._damaged: set[int] = set()  # and to be wrong; the next save sets them aside
        self._pending: tuple[int, Path, Future[None]] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def save(
        self, step: int, state: Any, *, metadata: dict[str, Any], score: float | None, stacked: bool
    ) -> bool:
        """Starts to save a pytree of arrays; returns once they are copied from the devices, so they
        may be donated.

        Args:
          metadata: anything JSON, such as the config; `metadata(step)` returns it.
          score: decides which are the best (lowest); None or NaN is never the best.
          stacked: layers below "repeats" are stacked over a leading axis in `state` (model.scan).

        Returns False, and saves nothing, when this object has saved or restored that very step.
        Damaged checkpoints, and those of this step or a later one from elsewhere (another history
        of the run), are renamed. Raises SaveFailed when the save before this one failed, or this
        one cannot begin.
        """
        self._wait()
        if step in self._here and self._is_there(step):
            return False
        arrays: Any = flat_lib.unstack(flat_lib.flatten(state), stacked)
        described = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}
        score = None if score is None or math.isnan(score) else float(score)
        content = {"step": step, "score": score, "metadata": metadata, "arrays": described}
        json.dumps(content)  # what is not JSON fails here, not in the background
        self._make_room(step)
        self.directory.mkdir(
            parents=True, exist_ok=True
        )  # a network drive may show it late to others
        with ExitStack() as stack:
            place = stack.enter_context(alias.plain(self.directory, _all_of))
            response = ocp.save_async(str(folder.step_path(place, step)), arrays)
            later = stack.pop_all()  # the directory stays open until the save has ended
        commit = self._thread.submit(self._commit, response, place, later, content)
        self._pending = step, place, commit
        return True

    def poll(self) -> None:
        """Raises SaveFailed when a save has failed in the background; costs nothing, so call it
        every step.

        A save commits itself, as soon as it is on disk: that does not wait for a call.
        """
        if self._pending and self._pending[-1].done():
            self._wait()

    def latest(self) -> int | None:
        """The newest step that can be restored, its files verified; None when there is none.

        A damaged checkpoint is reported (logging, a warning) and passed over. Raises UserError when
        all are damaged.
        """
        self._wait()
        found = _agree(self._newest_sound() if jax.process_index() == 0 else 0)
        if found == -2:
            raise NoCheckpoint(
                f"every checkpoint in {self.directory} is damaged: move that directory away to "
                "start again from step 0"
            )
        return None if found == -1 else found

    def restore(self, step: int, abstract_state: Any, *, stacked: bool) -> Any:
        """The state of a step, bit for bit.

        Args:
          abstract_state: a pytree of jax.ShapeDtypeStruct (or arrays) with the shapes, dtypes and
              shardings to restore
            into, on any mesh; the result of jax.eval_shape will do.
          stacked: as in `save`; need not be what it was there.

        Raises UserError when there is no such checkpoint, when it is damaged, or when it does not
        fit the state.
        """
        path = self.path(step)
        wanted = flat_lib.flatten(abstract_state)
        layers = flat_lib.abstract_layers(wanted, stacked)
        saved = read_manifest(path)["arrays"]
        widened = _widened(saved, layers)
        _refuse_misfits(path, {**saved, **widened}, layers)
        if widened and jax.process_index() == 0:
            log.warning("the checkpoint %s has moments in bfloat16: they go on in float32", path)
        arrays = flat_lib.stack(load_arrays(path, layers), wanted, stacked)
        self._here.add(step)
        return flat_lib.unflatten(arrays, abstract_state)

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what was given to `save`. Raises UserError when there is no such checkpoint."""
        return read_manifest(self._committed(step))["metadata"]

    def path(self, step: int) -> Path:
        """The directory of a step, its files verified. Raises UserError as `restore` does."""
        path = self._committed(step)
        what = manifest.damage(path) if jax.process_index() == 0 and step not in self._sound else ""
        if _agree(bool(what)):
            raise UserError(
                f"the checkpoint {path} is damaged ({what or 'see process 0'}): take another step"
            )
        self._sound.add(step)
        return path

    def steps(self) -> list[int]:
        """The steps that are committed, in order; their files are not verified."""
        self._wait()
        return folder.committed_steps(self.directory)

    def close(self) -> None:
        """Waits for the save in the background; a process that exits without it loses that save.

        Raises SaveFailed when the save failed.
        """
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def _is_there(self, step: int) -> bool:
        """Returns whether a checkpoint that was saved or restored is still there."""
        path = folder.step_path(self.directory, step)
        return bool(_agree(jax.process_index() == 0 and folder.has_manifest(path)))

    def _make_room(self, step: int) -> None:
        """Prepares the directory for a save, in process 0, and lets all processes know how that
        went.
        """
        failure = None
        if jax.process_index() == 0:
            try:
                folder.begin_save(self.directory, step, self._damaged)
            except OSError as error:
                failure = error
        if _agree(failure is not None):
            where, what = folder.step_path(self.directory, step), failure or "see process 0"
            raise SaveFailed(f"{where} cannot be saved{_free(where)}: {what}")
        self._damaged.clear()

    def _commit(
        self, response: Any, place: Path, stack: ExitStack, content: dict[str, Any]
    ) -> None:
        """Waits for Orbax and writes the manifest, once the arrays are found where a restore looks
        for them.

        Args:
          place: a plain name of the directory, valid until `stack` is closed.
        """
        step = content["step"]
        with stack:
            response.result()
            if jax.process_index() == 0:
                path = folder.step_path(place, step)
                _refuse_unreadable(path, content["arrays"])
                manifest.write(path, content)
        self._sound.add(step)
        if jax.process_index() == 0:
            folder.end_save(self.directory, step)
            folder.prune(self.directory, self.keep, self.keep_best, self._sound)

    def _wait(self) -> None:
        if not self._pending:
            return
        (step, place, commit), self._pending = self._pending, None
        path = folder.step_path(self.directory, step)
        if error := commit.exception():
            what = str(error).replace(str(place), str(self.directory))
            reason = f"{type(error).__name__}: {what}".splitlines()[0]
            raise SaveFailed(f"saving {path} failed{_free(path)}: {reason}") from error
        self._here.add(step)

    def _newest_sound(self) -> int:
        steps = folder.committed_steps(self.directory)
        for step in reversed(steps):
            path = folder.step_path(self.directory, step)
            what = "" if step in self._sound else manifest.damage(path)
            if not what:
                self._sound.add(step)
                return step
            if step not in self._damaged:
                log.warning(
                    "the checkpoint %s is damaged (%s): going back to the one before it", path, what
                )
            self._damaged.add(step)
        return -2 if steps else -1

    def _committed(self, step: int) -> Path:
        steps = self.steps()
        if step not in steps:
            have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}: {have}")
        return folder.step_path(self.directory, step)


def load_arrays(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Some arrays of the checkpoint at `path`, by their names on disk; dtypes are cast to the
    wanted ones.
    """
    every = read_manifest(path)["arrays"]
    target: Any = {name: wanted.get(name, ocp.PLACEHOLDER) for name in every}
    with alias.plain(path) as place:
        loaded: Any = ocp.load(str(place), target)
    return {name: loaded[name] for name in wanted}


def _widened(saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The moments that a run saved in bfloat16, as they used to be, and that are float32 now: no
    digit is lost when they are read.
    """
    moments = {
        name: saved[name] for name in wanted if name.startswith("opt_state/") and name in saved
    }
    old = {
        n: shape
        for n, (shape, dtype) in moments.items()
        if dtype == "bfloat16" and wanted[n].dtype == "float32"
    }
    return {name: [shape, "float32"] for name, shape in old.items()}


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint. Raises UserError when it is damaged."""
    try:
        return manifest.read(path)
    except manifest.Damaged as error:
        raise UserError(f"the checkpoint {path} is damaged ({error}): take another step") from None


def _refuse_unreadable(path: Path, arrays: dict[str, Any]) -> None:
    """Raises OSError unless Orbax finds every array at `path`, as it will when it restores them."""
    found: Any = ocp.metadata(str(path)).metadata
    for name, (shape, dtype) in arrays.items():
        there = found.get(name) if isinstance(found, dict) else None
        if there is None or [list(there.shape), str(there.dtype)] != [shape, dtype]:
            raise OSError(f"{name} was written, and cannot be read back")


def _refuse_misfits(
    path: Path, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]
) -> None:
    misfits = []
    for name in sorted(saved.keys() | wanted.keys()):
        here = f"{wanted[name].dtype}{list(wanted[name].shape)}" if name in wanted else "absent"
        there = f"{saved[name][1]}{saved[name][0]}" if name in saved else "absent"
        if here != there:
            misfits.append(f"{name} is {there} in the checkpoint and {here} in this run")
    if misfits:
        more = f"; and {len(misfits) - 8} more" if len(misfits) > 8 else ""
        raise UserError(
            f"the checkpoint {path} does not fit this run: {'; '.join(misfits[:8])}{more}. Resume "
            "with the config it "
            "was saved with, or start a new run from its parameters with train.init_from"
        )


def _all_of(value: int) -> list[int]:
    """Returns the values of all processes, on every process."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def _agree(value: int) -> int:
    """The value of process 0, on every process."""
    return (
        int(multihost_utils.broadcast_one_to_all(np.int32(value)))
        if jax.process_count() > 1
        else int(value)
    )


def _free(path: Path) -> str:
    parent = path.parent
    return (
        f" ({shutil.disk_usage(parent).free:,} bytes are free there)"
        if os.path.isdir(parent)
        else ""
    )
