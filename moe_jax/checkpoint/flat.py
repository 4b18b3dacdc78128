"""A state as a flat dict of named arrays, with the layers unstacked.

Names are the path of a leaf joined by "/": "params/layers/repeats/0/attention/q". A model built
with scan holds the layers below a key "repeats" stacked over a leading axis; on disk a layer is
always an array of its own, with its number after "repeats", which is where a model that loops over
its layers has it too. So both read each other's checkpoints.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moe_jax.names import REPEATS, is_layer, name_of

Flat = dict[str, Any]


def flatten(tree: Any) -> Flat:
    """{"params/embed": leaf, ...}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `flatten`, with the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in flatten(like)])


def layer_names(name: str, shape: tuple[int, ...], stacked: bool) -> list[str] | None:
    """The names on disk of the layers of a stacked array; None for an array that is not stacked."""
    if not stacked or not is_layer(name):
        return None
    parts = name.split("/")
    if not shape:
        raise ValueError(
            f'{name} is a scalar below "repeats": a stacked state has a leading axis of layers '
            "there"
        )
    at = parts.index(REPEATS) + 1
    return ["/".join((*parts[:at], str(i), *parts[at:])) for i in range(shape[0])]


def unstack(flat: Mapping[str, jax.Array], stacked: bool) -> Flat:
    """The arrays as they are on disk.

    Layers are sliced on the devices, one array at a time, and kept on the host.
    """
    out: Flat = {}
    for name, x in flat.items():
        names = layer_names(name, x.shape, stacked)
        if names is None:
            out[name] = x
            continue
        layers = _layers(x)
        host = [
            jax.device_put(layer, layer.sharding.with_memory_kind("pinned_host"))
            for layer in layers
        ]
        out.update(
            zip(names, jax.block_until_ready(host))
        )  # before the next array takes device memory of its own
    return out


def abstract_layers(flat: Mapping[str, Any], stacked: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every array on disk, for abstract (or concrete) arrays of a
    state.
    """
    out = {}
    for name, x in flat.items():
        place, names = placement(x), layer_names(name, x.shape, stacked)
        if names is None:
            out[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        else:
            if isinstance(place, NamedSharding):
                place = NamedSharding(place.mesh, P(*place.spec[1:]))
            out.update(
                {n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place) for n in names}
            )
    return out


def stack(layers: Flat, flat: Mapping[str, Any], stacked: bool) -> Flat:
    """The arrays of a state from the arrays on disk; empties `layers`, so that each is freed once
    it is stacked.
    """
    out: Flat = {}
    for name, x in flat.items():
        names = layer_names(name, x.shape, stacked)
        out[name] = (
            layers.pop(name)
            if names is None
            else _stacker(placement(x))([layers.pop(n) for n in names])
        )
    return out


def placement(x: Any) -> jax.sharding.Sharding:
    """The concrete sharding of an array or its abstract value; on the current mesh when that only
    knows its axes.
    """
    place, mesh = getattr(x, "sharding", None), jax.sharding.get_mesh()
    if isinstance(place, NamedSharding) and isinstance(place.mesh, AbstractMesh):
        place = None if place.mesh.empty else NamedSharding(mesh, place.spec)
    if place is None:
        return SingleDeviceSharding(jax.devices()[0]) if mesh.empty else NamedSharding(mesh, P())
    return place


@jax.jit
def _layers(x: jax.Array) -> list[jax.Array]:
    place = jax.typeof(x).sharding
    if not place.mesh.empty and any(place.spec[:1]):  # a dimension that is split cannot be indexed
        x = jax.sharding.reshard(x, NamedSharding(place.mesh, P(None, *place.spec[1:])))
    return [x[i] for i in range(x.shape[0])]


@functools.lru_cache
def _stacker(place: jax.sharding.Sharding) -> Any:
    return jax.jit(jnp.stack, out_shardings=place)
