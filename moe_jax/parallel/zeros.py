"""Zeros that a loop writes into."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax


def own_zeros(near: Array, shape: tuple[int, ...], dtype: Any, number: int = 0) -> Array:
    """Returns zeros for one loop to write into, which vary over the mesh axes as `near` does.

    Plain zeros are one constant of the whole program: XLA copies it for every loop that writes into
    it. These depend on a value of `near`, so that it cannot know them to be zeros, and writes them
    where they are needed, once. Zeros of one shape that depend on one array need a `number` each.
    """
    value = near[(0,) * (near.ndim - 1) + (number,)]
    if jnp.issubdtype(value.dtype, jnp.floating):
        value = lax.bitcast_convert_type(value, jnp.dtype(f"int{8 * value.dtype.itemsize}"))
    # The lowest bit is not negative, so this is 0 whatever the value, NaN too.
    zero = jnp.minimum(value & 1, 0).astype(dtype)
    return jnp.zeros_like(near, shape=shape, dtype=dtype) + zero
