"""What a planted fault is, and what several of them are made of.

Shapes as in moe/layer.py; n length of a mesh axis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DROPLESS = {"model.moe.dispatcher": "dropless", "model.moe.dispatchers.capacity.factor": 1.25}


class Mutation(NamedTuple):
    """A fault, and what of `verify` must find it."""

    plant: Callable[[Any], None]
    # "tracing", a check of compare.LIMITS, or a claim about one device.
    found_by: str
    # "mesh", "stages" (a pipeline), "layout" (one device, accumulated), "alone" (one device), or a
    # key of PARTS in tests/verify/test_mutations.py.
    where: str
    # Of the config.
    changes: dict[str, Any] = {}
    # Who told of it, or of one of its kind; "" = nobody that we know.
    reported: str = ""
    # It is planted in the full suite alone: the normal one has another of its kind.
    full: bool = False


def on_several_devices(axis: str) -> bool:
    return jax.lax.axis_size(axis) > 1


def length(axis: str) -> int:
    """Outside of a shard_map."""
    return jax.sharding.get_abstract_mesh().shape[axis]


def batch_devices() -> int:
    return length("data") * length("expert")


def times_gradient(factor, x):
    """x, whose gradient is multiplied by a factor."""
    return jax.tree.map(lambda z: factor * z - jax.lax.stop_gradient((factor - 1) * z), x)


def psum_of(wanted, wrong):
    """A `jax.lax.psum` that is `wrong(right, x, axis)` over `model` where `wanted(x)`.

    The layer sums one array over `model`, the loss of tokens a pair.
    """
    right = jax.lax.psum

    def psum(x, axis, **more):
        if axis == "model" and wanted(x):
            return wrong(right, x, axis)
        return right(x, axis, **more)

    return psum


def of_first_shard(right, x, axis):
    """As if the psum were missing, in a way that jax's check of replication cannot see: the part of
    the first shard alone.
    """
    mine = jax.lax.axis_index("model") == 0
    return right(jax.tree.map(lambda z: jnp.where(mine, z, 0), x), axis)
