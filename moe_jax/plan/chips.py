"""What vendors publish of their chips: the only place with such figures.

All are of one *device* as jax counts them (half a chip of a TPU7x), bytes and FLOPs a second.
Bandwidths count one direction, what a device can receive. Matrix products are dense.

Sources: TPUs, https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e and .../tpu7x (peak, memory,
interconnect of both directions, network of a chip). GPUs, the data sheets of NVIDIA A100 80GB SXM,
H100 SXM, H200 SXM and HGX B200 (peak without sparsity, memory, NVLink of both directions), and the
network cards of a DGX system of each, one for a GPU. What the compiler is told of a GPU (units,
caches, limits) is what its runtime reports, as the XLA project publishes it
(xla/backends/gpu/target_config/specs).
"""

from collections.abc import Mapping
from typing import NamedTuple

GB = 10**9
GIB = 2**30
TFLOPS = 10**12


class Gpu(NamedTuple):
    """Holds what XLA's compiler asks of a GPU beside the figures of the chip."""

    # (major, minor) of the compute capability.
    capability: tuple[int, int]
    num_cores: int
    units_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    # Of the memory, as the runtime reports it.
    memory_bytes: int


class Chip(NamedTuple):
    """One device."""

    name: str
    # What jax calls it begins so (`device.device_kind`).
    kinds: tuple[str, ...]
    # FLOP/s by the dtype of the operands. In float32 a TPU multiplies in bfloat16, and a GPU in
    # TF32, unless jax is told otherwise.
    peak: Mapping[str, float]
    memory: int
    memory_bandwidth: float
    # Of one link of a TPU's torus, or of all NVLinks of a GPU.
    link: float
    # To other slices, or other hosts.
    network: float
    # Dimensions of the torus; 0 = every device of a host reaches every other.
    torus: int
    # Devices along a dimension at which it closes to a ring; multiples do too.
    ring: int = 1
    # Devices of a chip.
    per_chip: int = 1
    gpu: Gpu | None = None


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    peak: float,
    memory: float,
    memory_bandwidth: float,
    interconnect: float,
    network_gbit: float,
    torus: int,
    ring: int,
    per_chip: int = 1,
) -> Chip:
    """Makes a TPU of the figures of a chip; `interconnect`: all links, both directions."""
    return Chip(
        name=name,
        kinds=kinds,
        peak=dict.fromkeys(("bfloat16", "float32"), peak / per_chip),
        memory=int(memory / per_chip),
        memory_bandwidth=memory_bandwidth / per_chip,
        # Two links for every dimension, each of two directions.
        link=interconnect / (2 * torus) / 2 / per_chip,
        network=network_gbit / 8 * GB / per_chip,
        torus=torus,
        ring=ring,
        per_chip=per_chip,
    )


_V5E = ("TPU v5 lite", "TPU v5e")
_V6E = ("TPU v6 lite", "TPU v6e")
_HOPPER = Gpu((9, 0), 132, 128, 1.98, 52_428_800, 233_472, 232_448, 84_942_979_072)
_AMPERE = Gpu((8, 0), 108, 64, 1.41, 41_943_040, 167_936, 166_912, 85_100_068_864)
_BLACKWELL = Gpu((10, 0), 148, 128, 1.965, 132_644_864, 233_472, 232_448, 191_514_411_008)


def _gpu(
    name: str, peak: float, tf32: float, bandwidth: float, nvlink: float, nic_gbit: float, gpu: Gpu
) -> Chip:
    """Makes a GPU; `nvlink`: both directions."""
    return Chip(
        name=name,
        kinds=(f"NVIDIA {name.upper()}",),
        peak={"bfloat16": peak, "float32": tf32},
        memory=gpu.memory_bytes,
        memory_bandwidth=bandwidth,
        link=nvlink / 2,
        network=nic_gbit / 8 * GB,
        torus=0,
        gpu=gpu,
    )


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", _V5E, 197 * TFLOPS, 16 * GIB, 819 * GB, 400 * GB, 25, 2, 16),
        _tpu("v5p", ("TPU v5p", "TPU v5"), 459 * TFLOPS, 95 * GIB, 2765 * GB, 1200 * GB, 50, 3, 4),
        _tpu("v6e", _V6E, 918 * TFLOPS, 32 * GIB, 1638 * GB, 800 * GB, 100, 2, 16),
        _tpu("tpu7x", ("TPU7x",), 2307 * TFLOPS, 192 * GIB, 7380 * GB, 1200 * GB, 100, 3, 4, 2),
        _gpu("a100", 312 * TFLOPS, 156 * TFLOPS, 2039 * GB, 600 * GB, 200, _AMPERE),
        _gpu("h100", 989.4 * TFLOPS, 494.7 * TFLOPS, 3352 * GB, 900 * GB, 400, _HOPPER),
        _gpu(
            "h200",
            989.4 * TFLOPS,
            494.7 * TFLOPS,
            4800 * GB,
            900 * GB,
            400,
            _HOPPER._replace(memory_bytes=151_397_597_184),
        ),
        _gpu("b200", 2250 * TFLOPS, 1125 * TFLOPS, 7672 * GB, 1800 * GB, 400, _BLACKWELL),
    )
}


def of_kind(device_kind: str) -> Chip | None:
    """Returns the chip that jax names so; None for what is in no data sheet here, as a CPU is.

    "TPU v5 lite" begins as "TPU v5" does: the longest name counts.
    """
    fitting = [
        (len(kind), chip)
        for chip in CHIPS.values()
        for kind in chip.kinds
        if device_kind.startswith(kind)
    ]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def peak(device_kind: str, dtype: str) -> float | None:
    """Returns the published FLOP/s of a device; None for an unknown chip or dtype."""
    chip = of_kind(device_kind)
    return chip.peak.get(dtype) if chip else None
