"""The arrays of a checkpoint, as Orbax writes and reads them, and whether they fit a run.

The only file that imports orbax (v1, whose names still move between releases).
"""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from moe_jax.checkpoint import alias, manifest
from moe_jax.errors import UserError

# Bytes under way to the disk in a frugal save.
IN_FLIGHT = 2**27
# Arrays that a message names.
MOST_MISFITS = 8

log = logging.getLogger(__name__)


def begin_writing(path: Path, arrays: dict[str, Any], *, frugal: bool) -> Any:
    """Begins to write arrays in the background, and returns once their copies are made.

    Args:
      path: the directory of the checkpoint.
      frugal: copies of few arrays at a time are in memory while they are written.

    The result is what Orbax returns: its `result()` waits for the arrays of all processes, and
    raises what went wrong.
    """
    # Orbax declares its trees more narrowly than it takes them.
    tree: Any = arrays
    with _few_at_a_time(arrays) if frugal else nullcontext():
        return ocp.save_async(str(path), tree)


def _few_at_a_time(arrays: Mapping[str, Any]) -> ocp.Context:
    """Returns the context in which arrays of IN_FLIGHT bytes, or one array, are written at a
    time.
    """
    context = ocp.Context()
    # Orbax refuses an array that takes all the room, or more.
    largest = max((array.nbytes for array in arrays.values()), default=0)
    context.memory.write_concurrent_bytes = max(largest + 1, IN_FLIGHT)
    return context


def load_arrays(path: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Returns some arrays of the checkpoint at `path`, by their names on disk.

    They get the dtypes and shardings of `wanted`.
    """
    saved = read_manifest(path)["arrays"]
    # Orbax wants to be told of every array that is there; a placeholder is not read.
    target: Any = {name: wanted.get(name, ocp.PLACEHOLDER) for name in saved}
    with alias.plain(path) as plain_path:
        loaded: Any = ocp.load(str(plain_path), target)
    return {name: loaded[name] for name in wanted}


def widened_moments(
    saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
    """Returns the moments of optimizers that are bfloat16 on disk and float32 in this run.

    Runs used to keep them in bfloat16. No digit is lost when they are read. They are returned as
    the manifest would have them in float32: {name: [shape, "float32"]}.
    """
    widened: dict[str, Any] = {}
    for name, array in wanted.items():
        if not name.startswith("opt_state/") or name not in saved:
            continue
        shape, dtype = saved[name]
        if dtype == "bfloat16" and array.dtype == "float32":
            widened[name] = [shape, "float32"]
    return widened


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint. Raises UserError when it is damaged."""
    try:
        return manifest.read(path)
    except manifest.Damaged as error:
        raise UserError(f"the checkpoint {path} is damaged ({error}): take another step") from None


def refuse_unreadable(path: Path, arrays: dict[str, Any]) -> None:
    """Raises OSError unless Orbax finds every array at `path`, as it will when it restores them.

    Nothing but the names, shapes and dtypes is read: the manifest has the digests of the rest.
    """
    on_disk: Any = ocp.metadata(str(path)).metadata
    for name, (shape, dtype) in arrays.items():
        array = on_disk.get(name) if isinstance(on_disk, dict) else None
        if array is None or [list(array.shape), str(array.dtype)] != [shape, dtype]:
            raise OSError(f"{name} was written, and cannot be read back")


def refuse_misfits(
    path: Path, saved: dict[str, Any], wanted: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises UserError where a checkpoint has not the arrays of a state.

    It names the first MOST_MISFITS of them.
    """
    misfits = []
    for name in sorted(saved.keys() | wanted.keys()):
        in_run, in_checkpoint = "absent", "absent"
        if name in wanted:
            in_run = f"{wanted[name].dtype}{list(wanted[name].shape)}"
        if name in saved:
            shape, dtype = saved[name]
            in_checkpoint = f"{dtype}{shape}"
        if in_run != in_checkpoint:
            misfits.append(f"{name} is {in_checkpoint} in the checkpoint and {in_run} in this run")
    if misfits:
        num_more = len(misfits) - MOST_MISFITS
        more = f"; and {num_more} more" if num_more > 0 else ""
        raise UserError(
            f"the checkpoint {path} does not fit this run: {'; '.join(misfits[:MOST_MISFITS])}"
            f"{more}. Resume with the config it was saved with, or start a new run from its "
            "parameters with train.init_from"
        )
