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
    """Returns the leaves of a tree by their names: {"params/embed": leaf, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name_of(path): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any], like: Any) -> Any:
    """Returns a tree with the structure of `like` from its leaves by name."""
    # Both flatten in the same order, so names and structure belong together.
    leaves = [flat[name] for name in flatten(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def unstack(flat: Mapping[str, jax.Array], stacked: bool) -> Flat:
    """Returns the arrays as they are on disk: a layer each, by its name in a loop over layers.

    Layers are sliced on the devices, one array at a time, and kept on the host.
    """
    on_disk: Flat = {}
    for name, x in flat.items():
        layer_names = layout.layer_names(name, x.shape, stacked)
        if layer_names is None:
            on_disk[name] = x
            continue
        layers = []
        for layer in layout.layers_of(x):
            # A second copy of all layers may not fit into the memory of the devices.
            host_sharding = layer.sharding.with_memory_kind("pinned_host")
            layers.append(jax.device_put(layer, host_sharding))
        # Wait, before the next array takes device memory of its own.
        on_disk.update(zip(layer_names, jax.block_until_ready(layers)))
    return on_disk


def abstract_layers(flat: Mapping[str, Any], stacked: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and sharding of every array on disk, by its name there.

    `flat`: the abstract (or concrete) arrays of a state.
    """
    on_disk: dict[str, jax.ShapeDtypeStruct] = {}
    for name, x in flat.items():
        sharding = placement(x)
        layer_names = layout.layer_names(name, x.shape, stacked)
        if layer_names is None:
            on_disk[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            continue
        layer_sharding = layout.layer_sharding(sharding)
        # The leading axis of a stacked array counts its layers.
        layer = jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=layer_sharding)
        on_disk.update(dict.fromkeys(layer_names, layer))
    return on_disk


def stack(layers: Flat, flat: Mapping[str, Any], stacked: bool) -> Flat:
    """Returns the arrays of a state from the arrays on disk, with the shapes of `flat`.

    Empties `layers`, so that each array is freed once it is stacked.
    """
    state: Flat = {}
    for name, x in flat.items():
        layer_names = layout.layer_names(name, x.shape, stacked)
        if layer_names is None:
            state[name] = layers.pop(name)
        else:
            of_array = [layers.pop(layer_name) for layer_name in layer_names]
            # In the order of the layers, along a new leading axis.
            state[name] = layout.stack_layers(of_array, placement(x))
    return state


def placement(x: Any) -> jax.sharding.Sharding:
    """Returns the concrete sharding of an array or of its abstract value.

    One that only knows axes, as jax.eval_shape gives it, is taken to be on the current mesh; none
    at all means whole on every device of it.
    """
    sharding = getattr(x, "sharding", None)
    mesh = jax.sharding.get_mesh()
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = None if sharding.mesh.empty else NamedSharding(mesh, sharding.spec)
    if sharding is not None:
        return sharding
    return SingleDeviceSharding(jax.devices()[0]) if mesh.empty else NamedSharding(mesh, P())
