"""The checkpoints of one run: saved, found and restored. Arrays are those of array_files.py."""

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

from moe_jax.checkpoint import alias, array_files, folder, manifest, together
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
        alias.refuse_unreadable(self.directory)
        self.every, self.keep, self.keep_best = every, max(keep, 1), keep_best
        # Steps that this object saved or restored.
        self._own: set[int] = set()
        # Steps whose files are known to be right, so that they are read for a digest only once.
        self._sound: set[int] = set()
        # Steps whose files are known to be wrong; the next save sets them aside.
        self._damaged: set[int] = set()
        # The save in the background: its step, the plain path of the directory, its end.
        self._pending: tuple[int, Path, Future[None]] | None = None
        # One thread, so that two saves cannot overlap.
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def due(self, step: int) -> bool:
        """Returns whether a checkpoint is to be saved after a step."""
        return self.every > 0 and step % self.every == 0

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: dict[str, Any],
        score: float | None,
        stacked: bool,
        frugal: bool = False,
    ) -> bool:
        """Starts to save a pytree of arrays; returns once they are copied from the devices, so they
        may be donated.

        Args:
          metadata: anything JSON, such as the config; `metadata(step)` returns it.
          score: decides which are the best (lowest); None or NaN is never the best.
          stacked: layers below "repeats" are stacked over a leading axis in `state` (model.scan).
          frugal: copies of few arrays at a time are in memory while they are written, which takes
              longer; else of all of them.

        Returns False, and saves nothing, when this object has saved or restored that very step.
        Damaged checkpoints, and those of this step or a later one from elsewhere (another history
        of the run), are renamed. Raises SaveFailed when the save before this one failed, or this
        one cannot begin.
        """
        # 1. One save at a time. If the last one failed, this is where the run learns of it.
        self._wait()
        if step in self._own and self._is_there(step):
            return False
        # 2. Every layer under its own name, on the host. All other arrays are still on the devices.
        arrays: Any = flat_lib.unstack(flat_lib.flatten(state), stacked)
        described = {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}
        score = None if score is None or math.isnan(score) else float(score)
        content = {"step": step, "score": score, "metadata": metadata, "arrays": described}
        # What is not JSON fails here, not in the background when the arrays are written.
        json.dumps(content)
        # 3. Room in the directory, and the marker that says whose ruin it would be.
        self._make_room(step)
        # Process 0 has made it; a network drive may show it late to the others.
        self.directory.mkdir(parents=True, exist_ok=True)
        # 4. The copies are made when this returns, and are written in the background.
        with ExitStack() as stack:
            plain_path = stack.enter_context(alias.plain(self.directory, _all_of))
            path = folder.step_path(plain_path, step)
            response = array_files.begin_writing(path, arrays, frugal=frugal)
            # From here on the commit closes the directory, which stays open until the save ends.
            until_committed = stack.pop_all()
        shared = together.Save()
        commit = self._thread.submit(
            self._commit, shared, response, plain_path, until_committed, content
        )
        self._pending = step, plain_path, commit
        return True

    def poll(self) -> None:
        """Raises SaveFailed when a save has failed in the background; costs nothing, so call it
        every step.

        A save commits itself, as soon as it is on disk: that does not wait for a call.
        """
        if self._pending and self._pending[-1].done():
            self._wait()

    def latest(self) -> int | None:
        """Returns the newest step that can be restored, its files verified; None if there is none.

        A damaged checkpoint is reported (logging, a warning) and passed over. Raises UserError when
        all are damaged.
        """
        self._wait()
        is_first = jax.process_index() == 0
        steps = folder.committed_steps(self.directory) if is_first else []
        # All take what process 0 lists: none may go on from another step.
        num_steps = _agree(len(steps))
        for number in reversed(range(num_steps)):
            step = _agree(steps[number] if is_first else 0)
            damage = self._damage(step)
            if not damage:
                return step
            if is_first and step not in self._damaged:
                log.warning(
                    "the checkpoint %s is damaged (%s): going back to the one before it",
                    folder.step_path(self.directory, step),
                    damage,
                )
            # It is set aside by the next save, not here: a reader changes nothing.
            self._damaged.add(step)
        if not num_steps:
            return None
        raise NoCheckpoint(
            f"every checkpoint in {self.directory} is damaged: move that directory away to "
            "start again from step 0"
        )

    def restore(self, step: int, abstract_state: Any, *, stacked: bool) -> Any:
        """Returns the state of a step, bit for bit.

        Args:
          abstract_state: a pytree of jax.ShapeDtypeStruct (or arrays) with the shapes, dtypes and
              shardings to restore into, on any mesh; the result of jax.eval_shape will do.
          stacked: as in `save`; need not be what it was there.

        Raises UserError when there is no such checkpoint, when it is damaged, or when it does not
        fit the state.
        """
        path = self.path(step)
        wanted = flat_lib.flatten(abstract_state)
        layers = flat_lib.abstract_layers(wanted, stacked)
        saved = array_files.read_manifest(path)["arrays"]
        # Arrays are read in the dtypes of the run: float32 takes bfloat16 without a loss.
        widened = array_files.widened_moments(saved, layers)
        # Compared before anything is read: the arrays may be large, and Orbax says less.
        array_files.refuse_misfits(path, {**saved, **widened}, layers)
        if widened and jax.process_index() == 0:
            log.warning("the checkpoint %s has moments in bfloat16: they go on in float32", path)
        arrays = flat_lib.stack(array_files.load_arrays(path, layers), wanted, stacked)
        self._own.add(step)
        return flat_lib.unflatten(arrays, abstract_state)

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what was given to `save`. Raises UserError when there is no such checkpoint."""
        return array_files.read_manifest(self._committed(step))["metadata"]

    def path(self, step: int) -> Path:
        """Returns the directory of a step, its files verified. Raises as `restore` does."""
        path = self._committed(step)
        if damage := self._damage(step):
            raise UserError(f"the checkpoint {path} is damaged ({damage}): take another step")
        return path

    def steps(self) -> list[int]:
        """Returns the steps that are committed, in order; their files are not verified."""
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
        # Caught in process 0 alone: the others would wait for it in the save for ever.
        failure = None
        if jax.process_index() == 0:
            try:
                folder.begin_save(self.directory, step, self._damaged)
            except OSError as error:
                failure = error
        if _agree(failure is not None):
            path, reason = folder.step_path(self.directory, step), failure or "see process 0"
            raise SaveFailed(f"{path} cannot be saved{_free(path)}: {reason}")
        self._damaged.clear()

    def _commit(
        self,
        shared: together.Save,
        response: Any,
        plain_path: Path,
        until_committed: ExitStack,
        content: dict[str, Any],
    ) -> None:
        """Waits for Orbax and writes the manifest, once the arrays are found where a restore looks
        for them.

        Runs in the background, on all processes. A kill, or an error, at any point leaves what the
        table in __init__.py says.

        Args:
          plain_path: a plain name of the directory, valid until `until_committed` is closed.
        """
        step, is_first = content["step"], jax.process_index() == 0
        with shared:
            with until_committed:
                # The result of a process comes when the arrays of all processes are on disk.
                response.result()
                path = folder.step_path(plain_path, step)
                files = shared.digests(path)
                if is_first:
                    array_files.refuse_unreadable(path, content["arrays"])
                    # The commit: from here on the checkpoint counts.
                    manifest.write(path, {**content, "files": files})
            self._sound.add(step)
            if not is_first:
                shared.serve(self.directory)
                return
            folder.end_save(self.directory, step)
            # Old ones last: until the new one is committed they are what a run goes on from.
            folder.prune(self.directory, self.keep, self.keep_best, self._sound, shared.damage)

    def _wait(self) -> None:
        """Waits for the save in the background; raises SaveFailed, once, if it failed."""
        if not self._pending:
            return
        (step, plain_path, commit), self._pending = self._pending, None
        path = folder.step_path(self.directory, step)
        # This waits for the end of the save.
        if error := commit.exception():
            # The plain path, a number of a file that was open, tells a user nothing.
            message = str(error).replace(str(plain_path), str(self.directory))
            reason = f"{type(error).__name__}: {message}".splitlines()[0]
            raise SaveFailed(f"saving {path} failed{_free(path)}: {reason}") from error
        # Now it counts, and the same step need not be saved again.
        self._own.add(step)

    def _damage(self, step: int) -> str:
        """Returns what is wrong with a checkpoint, the same on all processes, which read its files
        together; "" for nothing.
        """
        # Process 0 alone knows those that it verified while it deleted old ones.
        if _agree(step in self._sound):
            return ""
        damage = together.damage(folder.step_path(self.directory, step))
        if not damage:
            self._sound.add(step)
        return damage

    def _committed(self, step: int) -> Path:
        """Returns the directory of a step. Raises UserError when it has no manifest."""
        steps = self.steps()
        if step not in steps:
            have = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            raise UserError(f"there is no checkpoint of step {step} in {self.directory}: {have}")
        return folder.step_path(self.directory, step)


def _all_of(value: int) -> list[int]:
    """Returns the values of all processes, on every process."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.int32(value)).tolist()


def _agree(value: int) -> int:
    """Returns the value of process 0, on every process."""
    if jax.process_count() == 1:
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _free(path: Path) -> str:
    """Returns how much room there is beside `path`, for a message: mostly it is too little."""
    if not os.path.isdir(path.parent):
        return ""
    return f" ({shutil.disk_usage(path.parent).free:,} bytes are free there)"
