"""How long collectives take on the network of a chip, from published bandwidths: a lower bound.

A group of devices has a near part, reached over the torus of a TPU or the NVLinks of a host, and a
far part behind the network between slices or hosts. What comes from the far part takes the
bandwidth of the network, all else that of the links.

On a torus a mesh axis runs along one or more dimensions. Along each it has two links if the
dimension closes to a ring, else one counts: the device at the end receives everything through it.
An all-to-all crosses a quarter of the ring on average, so every byte takes as many links.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from moe_jax.plan.chips import Chip
from moe_jax.plan.hlo.collectives import Collective


class Group(NamedTuple):
    """The devices of one collective, as the network sees them."""

    size: int
    # Devices of the group in the slice or host of one of them.
    near: int
    # Bytes a second that a device receives from near and far devices.
    near_bandwidth: float
    far_bandwidth: float
    # Links that a byte of an all-to-all crosses, on average.
    hops: float


def domain(device: Any, has_slices: bool) -> int:
    """Returns the number of the slice of a TPU, or of the host of another device."""
    # Devices of some platforms have neither number.
    return getattr(device, "slice_index" if has_slices else "process_index", None) or 0


def domains(mesh: Mesh) -> list[int]:
    """Returns the slice or the host of each device, in the order of the mesh."""
    devices = list(mesh.devices.flat)
    return [domain(device, devices[0].platform == "tpu") for device in devices]


def group_of(mesh: Mesh, axes: Sequence[str], chip: Chip) -> Group:
    """Returns the first group of devices along mesh axes."""
    # The group that has the first device: of every other axis it has place 0.
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    devices = list(np.asarray(mesh.devices[index]).ravel())
    of = [domain(device, bool(chip.torus)) for device in devices]
    near = [device for device, its in zip(devices, of, strict=True) if its == of[0]]
    bandwidth, hops = _links(near, mesh, chip) if chip.torus else (chip.link, 1.0)
    return Group(len(devices), len(near), bandwidth, chip.network, hops)


def _links(near: list[Any], mesh: Mesh, chip: Chip) -> tuple[float, float]:
    """Returns (bandwidth, hops of an all-to-all) of devices of one torus."""
    coords = np.array([device.coords for device in near])
    everywhere = np.array([device.coords for device in mesh.devices.flat])
    links, longest = 0, 1
    for dim in range(coords.shape[1]):
        # How many places the group has along this dimension of the torus.
        length = len(set(coords[:, dim]))
        if length == 1:
            continue
        whole = len(set(everywhere[:, dim]))
        # The last place is linked to the first one where the group takes the whole dimension.
        closes = length == whole and whole % chip.ring == 0
        links += 2 if closes else 1
        # A line is as slow as a ring of twice its length.
        longest = max(longest, length if closes else 2 * length)
    # Devices of one chip are nearer than any link.
    return max(links, 1) * chip.link, max(1.0, longest / 4)


def seconds(collective: Collective, mesh: Mesh, chip: Chip) -> float:
    """Returns the time of all runs of a collective in a step, if nothing else uses the network."""
    # A collective that names no axis is of the whole mesh.
    axes = collective.axes.split(" x ") if collective.axes else mesh.axis_names
    group = group_of(mesh, axes, chip)
    if group.size == 1:
        return 0.0
    far: float | None = collective.far
    if far is None:
        # It did not say how much is far: from every other device comes an equal part.
        far = collective.num_bytes * (group.size - group.near) / (group.size - 1)
    near = collective.num_bytes - far
    hops = group.hops if "all-to-all" in collective.kind else 1.0
    return near * hops / group.near_bandwidth + far / group.far_bandwidth
