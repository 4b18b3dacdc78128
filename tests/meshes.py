"""Meshes of the eight simulated devices, and arrays placed on them."""

import itertools

import jax
import jax.numpy as jnp

from moe_jax.parallel import mesh

# Every way to write 8 as data x expert x model.
ALL = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if s[0] * s[1] * s[2] == 8]


def make(data, expert, model):
    lengths = mesh.Lengths(data=data, expert=expert, model=model)
    return mesh.make(lengths, jax.devices()[: lengths.num_devices])


def put(array, *names):
    """An array placed by the logical names of its dimensions on the current mesh."""
    array = jnp.asarray(array)
    return jax.device_put(array, mesh.sharding(*names, *[None] * (array.ndim - len(names))))


def name(shape):
    return "x".join(map(str, shape))
