"""The collectives of the layer.

On an axis of length one each is the identity: XLA's CPU compiler would copy the operand instead.
"""

import jax


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Shards of all devices of a mesh axis, one after another along a dimension; the backward pass
    is a reduce-scatter.
    """
    return x if jax.lax.axis_size(axis) == 1 else jax.lax.all_gather(x, axis, axis=dim, tiled=True)


def reduce_scatter(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """The sum over a mesh axis, of which each device keeps its part of a dimension."""
    return (
        x
        if jax.lax.axis_size(axis) == 1
        else jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    )


def all_to_all(x: jax.Array, axis: str) -> jax.Array:
    """[n, ...] -> [n, ...]: part i goes to device i of a mesh axis, part j comes from device j."""
    return x if jax.lax.axis_size(axis) == 1 else jax.lax.all_to_all(x, axis, 0, 0)
