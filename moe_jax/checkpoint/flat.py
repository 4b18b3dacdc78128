"""A state as a flat dict of named arrays, with the layers unstacked.

Names are the path of a leaf joined by "/": "params/layers/repeats/0/attention/q". A model built
with scan holds its layers stacked; on disk a layer is always an array of its own, under the name
that a model which loops over its layers has (moe_jax/layout.py). So both read each other's
checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from moe_jax import layout
from moe_jax.names import name_of

Flat = dict[str, Any]


def flatten(tree: Any) -> Flat:
    """{"params/embed": leaf, ...}"""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any], like: Any) -> Any:
    """The inverse of `flatten`, with the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in flatten(like)])


def unstack(flat: Mapping[str, jax.Array], stacked: bool) -> Flat:
    """The arrays as they are on disk.

    Layers are sliced on the devices, one array at a time, and kept on the host.
    """
    out: Flat = {}
    for name, x in flat.items():
        names = layout.layer_names(name, x.shape, stacked)
        if names is None:
            out[name] = x
            continue
        host = [
            jax.device_put(layer, layer.sharding.with_memory_kind("pinned_host"))
            for layer in layout.layers_of(x)
        ]
        # Wait, before the next array takes device memory of its own.
        out.update(zip(names, jax.block_until_ready(host)))
    return out


def abstract_layers(flat: Mapping[str, Any], stacked: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every array on disk, for abstract (or concrete) arrays of a
    state.
    """
    out = {}
    for name, x in flat.items():
        sharding, names = placement(x), layout.layer_names(name, x.shape, stacked)
        if names is None:
            out[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        else:
            sharding = layout.layer_sharding(sharding)
            layer = jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)
            out.update(dict.fromkeys(names, layer))
    return out


def stack(layers: Flat, flat: Mapping[str, Any], stacked: bool) -> Flat:
    """The arrays of a state from the arrays on disk; empties `layers`, so that each is freed once
    it is stacked.
    """
    out: Flat = {}
    for name, x in flat.items():
        names = layout.layer_names(name, x.shape, stacked)
        if names is None:
            out[name] = layers.pop(name)
        else:
            out[name] = layout.stack_layers([layers.pop(n) for n in names], placement(x))
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
