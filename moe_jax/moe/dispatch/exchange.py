"""The collectives of the layer.

On an axis of length one each is the identity: XLA's CPU compiler would copy the operand instead.
`groups` are lists of places on the axis (jax's `axis_index_groups`), None = all of it together.
"""

from collections.abc import Sequence

import jax

# The name of tokens that have travelled, for policies of rematerialisation (models/stack.py).
SAVED = "moe_dispatch"
Groups = Sequence[Sequence[int]] | None


def all_gather(x: jax.Array, axis: str, dim: int, groups: Groups = None) -> jax.Array:
    """Returns the shards of all devices of a mesh axis, one after another along a dimension."""
    if jax.lax.axis_size(axis) == 1:
        return x
    # Its backward pass is a reduce-scatter.
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True, axis_index_groups=groups)


def reduce_scatter(x: jax.Array, axis: str, dim: int, groups: Groups = None) -> jax.Array:
    """Returns the sum over a mesh axis, of which each device keeps its part of a dimension."""
    if jax.lax.axis_size(axis) == 1:
        return x
    return jax.lax.psum_scatter(
        x, axis, scatter_dimension=dim, tiled=True, axis_index_groups=groups
    )


def all_to_all(x: jax.Array, axis: str) -> jax.Array:
    """Returns [n, ...] of [n, ...]: part i goes to device i of a mesh axis, part j comes from j."""
    if jax.lax.axis_size(axis) == 1:
        return x
    return jax.lax.all_to_all(x, axis, 0, 0)
