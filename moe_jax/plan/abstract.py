"""What is known of arrays before any is allocated: shapes, shardings, bytes of a shard."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from moe_jax.parallel.mesh import sharding
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS


def batch_of(cfg: Config) -> Any:
    """Returns the shapes and shardings of a batch of a config, of which one row is made."""
    train = dataclasses.replace(cfg.train, batch_size=1, micro_batch_size=1)
    one_row = TASKS[cfg.task].random(dataclasses.replace(cfg, train=train), 0)

    def widened(rows: np.ndarray) -> jax.ShapeDtypeStruct:
        abstract = _abstract_rows(rows)
        return abstract.update(shape=(cfg.train.batch_size, *rows.shape[1:]))

    return jax.tree.map(widened, one_row)


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
