"""A parameter that is put together on the devices of a mesh: each has its own part of it and no
more, and the host has one tensor at a time.
"""

import functools
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint import flat
from moe_jax.parallel import mesh

Place = tuple[int | slice, ...]


class Shards:
    """The parts of one array on the devices of this process; it begins as zeros.

    Args:
      like: its shape, dtype and sharding.
    """

    def __init__(self, like: Any):
        self._like, self._sharding = like, flat.placement(like)
        places = self._sharding.addressable_devices_indices_map(like.shape)
        # [first, last) of each dimension that a device has.
        self._bounds = {
            device: _bounds(place or (), like.shape) for device, place in places.items()
        }
        self._parts: dict[jax.Device, jax.Array] = {}

    def wants(self, place: Place) -> bool:
        """Returns whether a device of this process has any of what stands at a place."""
        return any(_overlap(place, bounds) for bounds in self._bounds.values())

    def put(self, place: Place, value: np.ndarray) -> None:
        """Writes what stands at a place: numbers and whole dimensions."""
        for device, bounds in self._bounds.items():
            overlap = _overlap(place, bounds)
            if overlap is None:
                continue
            # The value lacks the dimensions that are a number in the place.
            inside = tuple(cut for cut, at in zip(overlap, place, strict=True) if _is_whole(at))
            block = np.asarray(value[inside], self._like.dtype)
            shape = tuple(cut.stop - cut.start for cut in overlap)
            block = jax.device_put(block.reshape(shape), device)
            # A block that fills the whole part needs no zeros to be written into.
            if shape == _shape(bounds):
                self._parts[device] = block
            else:
                first = _first(place, bounds)
                # The program of one device, whatever the mesh is.
                with jax.set_mesh(_mesh_of(device)):
                    self._parts[device] = _written(self._part(device), block, first)

    def whole(self) -> jax.Array:
        """Returns the array."""
        parts = [self._part(device) for device in self._bounds]
        return jax.make_array_from_single_device_arrays(self._like.shape, self._sharding, parts)

    def _part(self, device: jax.Device) -> jax.Array:
        if device not in self._parts:
            zeros = np.zeros(_shape(self._bounds[device]), self._like.dtype)
            self._parts[device] = jax.device_put(zeros, device)
        return self._parts[device]


@functools.cache
def _mesh_of(device: jax.Device) -> jax.sharding.Mesh:
    return mesh.make(mesh.ONE, [device])


@jax.jit(donate_argnums=0)
def _written(part: jax.Array, block: jax.Array, first: list[int]) -> jax.Array:
    """Returns a part with a block in it, in the memory of the part."""
    return jax.lax.dynamic_update_slice(part, block, first)


def _bounds(place: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    # A slice without ends is the whole dimension.
    return [cut.indices(size)[:2] for cut, size in zip(place, shape, strict=True)]


def _shape(bounds: list[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(high - low for low, high in bounds)


def _is_whole(at: int | slice) -> bool:
    return isinstance(at, slice)


def _first(place: Place, bounds: list[tuple[int, int]]) -> list[int]:
    """Returns where a place begins in the part of a device."""
    pairs = zip(place, bounds, strict=True)
    return [0 if isinstance(at, slice) else at - low for at, (low, _) in pairs]


def _overlap(place: Place, bounds: list[tuple[int, int]]) -> tuple[slice, ...] | None:
    """Returns what of a place a device has, each dimension counted in the place; None = nothing."""
    cuts = []
    for at, (low, high) in zip(place, bounds, strict=True):
        if isinstance(at, slice):
            cuts.append(slice(low, high))
        elif low <= at < high:
            cuts.append(slice(0, 1))
        else:
            return None
    return tuple(cuts)
