"""Which mesh axes an array varies over inside a `jax.shard_map` with `check_vma=True`."""

import jax.numpy as jnp
from jax import Array


def vary_alike(*arrays: Array) -> list[Array]:
    """Makes all arrays vary over the union of the mesh axes that any of them varies over.

    A `custom_vjp` must return cotangents that vary exactly as its primals do, which is certain only
    when all of them vary alike; the sum over the added axes is then the transpose of this function.
    Outside of a `shard_map` it changes nothing.
    """
    # A scalar zero made by `zeros_like` varies as its model does. Adding it costs nothing: XLA
    # removes the addition, and the type remains.
    zeros = [jnp.zeros_like(array, shape=(), dtype=jnp.int32) for array in arrays]
    zero = sum(zeros[1:], start=zeros[0])
    return [array + zero.astype(array.dtype) for array in arrays]
