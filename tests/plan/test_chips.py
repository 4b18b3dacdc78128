"""Published figures, and the time of collectives worked out by hand from them."""

from types import SimpleNamespace

import jax
import meshes
import numpy as np
import pytest

from moe_jax.parallel import chip_flags
from moe_jax.plan import chips, flops, gpu_target, network
from moe_jax.plan.hlo.collectives import Collective

GB = 10**9


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA B200", "b200"),
        ("cpu", None),
        ("TPU v3", None),
    ],
)
def test_a_chip_is_known_by_what_jax_calls_it(kind, name):
    found = chips.of_kind(kind)
    assert (found.name if found else None) == name


def test_a_device_of_a_chip_with_two_has_half_of_it():
    half = chips.CHIPS["tpu7x"]
    assert half.per_chip == 2 and half.memory == 96 * 2**30
    assert half.peak["bfloat16"] == 2307e12 / 2


def test_an_unknown_dtype_has_no_peak():
    assert chips.peak("TPU v5", "float64") is None and chips.peak("cpu", "bfloat16") is None


def described(lengths, coords, *, slices=None, hosts=None, names=("data", "expert")):
    """A mesh of devices that have places on a torus, or hosts."""
    devices = np.empty(len(coords), object)
    for i, place in enumerate(coords):
        devices[i] = SimpleNamespace(
            coords=place,
            slice_index=slices[i] if slices else None,
            process_index=hosts[i] if hosts else 0,
        )
    return SimpleNamespace(devices=devices.reshape(lengths), axis_names=names)


def over(axes, kind="all-gather", num_bytes=GB):
    return Collective(kind, axes, 0, "tokens", False, 1, num_bytes)


def test_a_ring_has_two_links_and_a_line_one():
    chip = chips.CHIPS["v5e"]
    # 400 GB/s of four links in both directions.
    assert chip.link == 50 * GB
    ring = described((16, 1), [(i, 0, 0) for i in range(16)])
    line = described((4, 1), [(i, 0, 0) for i in range(4)])
    assert network.seconds(over("data"), ring, chip) == pytest.approx(1 / 100)
    assert network.seconds(over("data"), line, chip) == pytest.approx(1 / 50)


def test_an_axis_along_two_dimensions_has_the_links_of_both():
    places = [(i, j, 0) for i in range(16) for j in range(16)]
    square = described((256, 1), places)
    assert network.seconds(over("data"), square, chips.CHIPS["v5e"]) == pytest.approx(1 / 200)


def test_an_all_to_all_crosses_a_quarter_of_the_ring():
    ring = described((16, 1), [(i, 0, 0) for i in range(16)])
    found = network.seconds(over("data", "all-to-all"), ring, chips.CHIPS["v5e"])
    assert found == pytest.approx(4 / 100)


def test_what_crosses_slices_takes_the_network_between_them():
    chip = chips.CHIPS["v5e"]
    places, slices = [(0, 0, 0), (1, 0, 0)] * 2, [0, 0, 1, 1]
    two = described((2, 2), places, slices=slices)
    # 25 Gbit/s for a chip.
    assert network.seconds(over("data"), two, chip) == pytest.approx(1 / 3.125)
    # Of three others, two are far.
    far, near = 2 / 3 / 3.125, 1 / 3 / 50
    assert network.seconds(over("data x expert"), two, chip) == pytest.approx(far + near)


def test_a_host_of_gpus_has_nvlink_and_others_are_behind_the_network():
    chip = chips.CHIPS["h100"]
    two = described((2, 2), [()] * 4, hosts=[0, 0, 1, 1])
    assert network.seconds(over("expert"), two, chip) == pytest.approx(1 / 450)
    assert network.seconds(over("data"), two, chip) == pytest.approx(1 / 50)


def test_one_device_waits_for_nobody():
    one = described((1, 2), [(0, 0, 0), (1, 0, 0)])
    assert network.seconds(over("data"), one, chips.CHIPS["v5e"]) == 0


@pytest.mark.parametrize("name", [name for name, chip in chips.CHIPS.items() if chip.gpu])
def test_a_gpu_is_described_to_its_compiler(name):
    text = gpu_target.text(chips.CHIPS[name])
    assert (
        text.count("{") == text.count("}")
        and f"core_count: {chips.CHIPS[name].gpu.num_cores}" in text
    )


def test_flags_are_those_of_the_kind_and_can_be_left_out():
    tpu = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="TPU v5 lite")]))
    cpu = SimpleNamespace(devices=np.array([SimpleNamespace(device_kind="cpu")]))
    assert all(name.startswith("xla_") for name in chip_flags.of(tpu, True))
    assert (
        chip_flags.of(tpu, True) and not chip_flags.of(tpu, False) and not chip_flags.of(cpu, True)
    )
    assert "=true" in chip_flags.text(chip_flags.of(tpu, True))
    assert "xla_disable_hlo_passes=rematerialization" in chip_flags.text(
        chip_flags.of_kind("NVIDIA H100")
    )


def test_the_peak_of_a_run_is_published_or_measured(monkeypatch):
    monkeypatch.setattr(flops, "measure_peak", lambda dtype: 7.0)
    with jax.set_mesh(meshes.make(2, 2, 2)):
        assert flops.peak("float32") == 7.0
        monkeypatch.setattr(chips, "of_kind", lambda kind: chips.CHIPS["v5e"])
        assert flops.peak("bfloat16") == 8 * 197e12
        # No data sheet has a peak for it.
        assert flops.peak("float64") == 7.0
