"""From NumPy rows to arrays on the mesh: each process reads only the rows of its own devices."""

from typing import Any

import jax
import numpy as np

from moe_jax.parallel.mesh import sharding


def local_rows(batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold, in order."""
    place = sharding("batch")
    slices = place.addressable_devices_indices_map((batch_size,)).values()
    spans = {
        (s[0].start or 0, batch_size if s[0].stop is None else s[0].stop)
        for s in slices
        if s is not None
    }
    return np.unique(np.concatenate([np.arange(*span) for span in spans]))


def put(local: Any, rows: np.ndarray, batch_size: int) -> Any:
    """Returns the global batch, sharded over rows, from this process's rows.

    Args:
      local: a tree of NumPy arrays, as a rule the NamedTuple of a task; its type is kept.
      rows: what `local_rows` returns.
    """

    def place(array: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first = index[0].start or 0
            count = (batch_size if index[0].stop is None else index[0].stop) - first
            begin = int(np.searchsorted(rows, first))
            return array[begin : begin + count]

        shape = (batch_size,) + array.shape[1:]
        return jax.make_array_from_callback(
            shape, sharding("batch", *[None] * (array.ndim - 1)), shard
        )

    return jax.tree.map(place, local)
