"""Arrays whose leading axis, that of the repeats of a stack, is split over the mesh axis `stage`.

A pipeline (moe_jax/pipeline) has the weights of its stages so. Whatever else runs the layers, an
evaluation above all, has one repeat at a time on all stages.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

AXIS = "stage"


def split(z: jax.Array) -> jax.Array:
    """Returns an array [R, ...] split over `stage` where that has a length that divides R, as it
    is where it has not.
    """
    # A mesh that is made elsewhere may lack the axis.
    num_stages = jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)
    if num_stages == 1 or z.shape[0] % num_stages:
        return z
    return jax.sharding.reshard(z, P(AXIS, *jax.typeof(z).sharding.spec[1:]))


def whole(z: Any) -> Any:
    """Returns an array of which every stage has all repeats; what is on the host stays as it is."""
    if not is_split(z):
        return z
    return jax.sharding.reshard(z, P(None, *jax.typeof(z).sharding.spec[1:]))


def as_split(z: jax.Array, like: jax.Array) -> jax.Array:
    """Returns an array that is split as another one of its shape is."""
    return jax.sharding.reshard(z, jax.typeof(like).sharding.spec) if is_split(like) else z


def is_split(z: Any) -> bool:
    """Returns whether the leading axis of an array is split over `stage`."""
    return isinstance(z, jax.Array) and AXIS in jax.typeof(z).sharding.spec[:1]


def are_split(tree: Any) -> bool:
    """Returns whether arrays of a tree are."""
    return any(is_split(z) for z in jax.tree.leaves(tree))


def one_repeat(tree: Any, i: jax.Array) -> Any:
    """Returns entry `i` of every array of a tree, on all stages: its owner sends it to the others.

    So no stage ever has the weights of all layers.
    """

    def on_stage(stage_1: jax.Array, tree: Any, i: jax.Array) -> Any:
        def take(z: jax.Array) -> jax.Array:
            owner, place = i // z.shape[0], i % z.shape[0]
            own = jax.lax.dynamic_index_in_dim(z, place, keepdims=False)
            # All but the owner add zeros, so the sum is the owner's entry.
            return jax.lax.psum(jax.lax.select(owner == stage_1[0], own, jnp.zeros_like(own)), AXIS)

        return jax.tree.map(take, tree)

    # As in moe_jax/pipeline/totals.py.
    run = jax.shard_map(
        on_stage,
        in_specs=(P(AXIS), P(AXIS), P()),
        out_specs=P(),
        axis_names={AXIS},
        check_vma=False,
    )
    return run(numbers(), tree, i)


def numbers() -> jax.Array:
    """Returns the numbers of the stages, of which each has its own."""
    num_stages = jax.sharding.get_abstract_mesh().shape[AXIS]
    return jax.sharding.reshard(jnp.arange(num_stages, dtype=jnp.int32), P(AXIS))
