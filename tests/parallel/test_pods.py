"""Meshes of pods: tori whose axes are split, several slices, and what the hardware cannot make.

The devices are described by what jax asks of them. Those of libtpu are tried where it is installed.
"""

import importlib.util
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.plan import topology

V5P, V6E, V5E = "TPU v5p", "TPU v6 lite", "TPU v5 lite"


def torus(kind, *lengths, slices=1):
    """The TPUs of slices, in the order of jax: the first coordinate varies fastest."""
    devices = []
    for part in range(slices):
        for place in itertools.product(*(range(n) for n in reversed(lengths))):
            coords = list(reversed(place)) + [0] * (3 - len(lengths))
            devices.append(
                SimpleNamespace(
                    id=len(devices),
                    platform="tpu",
                    device_kind=kind,
                    coords=coords,
                    core_on_chip=0,
                    slice_index=part,
                    process_index=len(devices) // 4,
                )
            )
    return devices


@pytest.mark.parametrize(
    ("devices", "text"),
    [
        (torus(V5P, 4, 4, 4), "8x8x1"),
        (torus(V5P, 4, 4, 4), "2x8x4"),
        (torus(V5P, 8, 8, 8), "64x8x1"),
        (torus(V5P, 8, 8, 8), "128x4x1"),
        (torus(V6E, 4, 4), "2x8x1"),
        (torus(V6E, 16, 16), "32x8x1"),
        (torus(V5E, 16, 16), "2x128x1"),
        (torus(V5P, 2, 2, 1), "1x4x1"),
    ],
)
def test_physical_axes_are_split(devices, text):
    lengths = mesh.parse(text, "--mesh")
    array = mesh.arranged(lengths, devices, "data")
    assert array.shape == tuple(lengths)
    assert sorted(device.id for device in array.flat) == list(range(len(devices)))


def test_neighbours_on_an_axis_are_neighbours_on_the_torus():
    """An axis as long as a dimension of the torus runs along it."""
    array = mesh.arranged(mesh.Lengths(data=16, expert=4), torus(V5P, 4, 4, 4), "data")
    for line in array.reshape(16, 4):
        varying = np.ptp([device.coords for device in line], axis=0)
        assert sorted(varying) == [0, 0, 3]


@pytest.mark.parametrize("slow_axis", ["data", "expert"])
def test_the_slow_axis_crosses_slices(slow_axis):
    devices = torus(V5E, 4, 4, slices=2)
    array = mesh.arranged(mesh.Lengths(data=4, expert=8), devices, slow_axis)
    slices = np.vectorize(lambda device: device.slice_index)(array)[0, :, :, 0, 0]
    along = slices if slow_axis == "data" else slices.T
    # Two contiguous halves, and every other axis within a slice.
    assert (along[: len(along) // 2] == along[0, 0]).all()
    assert (along[len(along) // 2 :] == 1 - along[0, 0]).all()


@pytest.mark.parametrize(
    ("lengths", "slow_axis", "message"),
    [
        ((1, 32, 1), "data", "the mesh 1x32x1 has mesh.data = 1, which 2 slices do not divide"),
        ((32, 1, 1), "model", "mesh_slow_axis names the axis that crosses slices: "),
        ((3, 8, 1), "data", "the mesh 3x8x1 makes 24 devices, and there are 32: "),
    ],
)
def test_what_cannot_be_made_is_one_line_with_the_nearest(lengths, slow_axis, message):
    data, expert, model = lengths
    wanted = mesh.Lengths(data=data, expert=expert, model=model)
    with pytest.raises(UserError) as error:
        mesh.arranged(wanted, torus(V5E, 4, 4, slices=2), slow_axis)
    assert message in str(error.value) and "\n" not in str(error.value)
    nearest = mesh.parse(str(error.value).rpartition(" ")[2], "--mesh")
    assert nearest.num_devices == 32 and getattr(nearest, slow_axis) % 2 == 0


def test_the_nearest_mesh_differs_by_the_smallest_factor():
    assert str(mesh.nearest(mesh.Lengths(data=3, expert=8), 32)) == "4x8x1"
    assert str(mesh.nearest(mesh.Lengths(expert=32), 32, slices=2)) == "2x16x1"
    assert mesh.nearest(mesh.Lengths(), 3, slices=2) is None


def test_lengths_that_do_not_make_the_devices_are_told_the_nearest():
    with pytest.raises(UserError, match=r"the nearest mesh is 4x2x1"):
        mesh.resolve(mesh.Lengths(data=3, expert=2), 8)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu [tpu]")
@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("v5p:4x4x4", "8x8x1"),
        ("v6e:4x4", "2x8x1"),
        ("v5p:8x8x8", "64x8x1"),
        ("2*v5e:4x4", "4x8x1"),
        ("tpu7x:2x2x1", "2x4x1"),
    ],
)
def test_a_described_topology_makes_the_mesh(where, text):
    devices = topology.devices(topology.parse(where))
    assert mesh.of(mesh.make(mesh.parse(text, "--mesh"), devices)) == mesh.parse(text, "--mesh")
