"""What is known of arrays before any is allocated: shapes, shardings, bytes of a shard."""

import math
from typing import Any

import jax
import numpy as np

from moe_jax.parallel.mesh import sharding


def abstract_batch(batch: Any) -> Any:
    """Returns the shapes and shardings of a batch, a pytree of NumPy arrays [B, ...]."""
    return jax.tree.map(_abstract_rows, batch)


def _abstract_rows(rows: np.ndarray) -> jax.ShapeDtypeStruct:
    rows_sharding = sharding("batch", *[None] * (rows.ndim - 1))
    # What the device makes of NumPy's float64.
    dtype = jax.dtypes.canonicalize_dtype(rows.dtype)
    return jax.ShapeDtypeStruct(rows.shape, dtype, sharding=rows_sharding)


def shard_bytes(tree: Any) -> int:
    """Returns the bytes of one shard of every abstract array of a tree, summed.

    An array without a sharding lies whole on every device.
    """
    total = 0
    for array in jax.tree.leaves(tree):
        shape = array.sharding.shard_shape(array.shape) if array.sharding else array.shape
        total += math.prod(shape) * array.dtype.itemsize
    return total
