"""The devices of a topology that is written as text, whether they are there or not.

    cpu:8          eight simulated devices of this machine
    v5e:4x4        a TPU slice of 4 x 4 chips; v5p, v6e and tpu7x are the others
    2*v5p:4x4x4    two slices
    h100:8x8       eight hosts of eight GPUs; h100:8 is one host; a100, h200 and b200 are the others

Described devices compile and run nothing. A TPU's compiler is libtpu (the extra [tpu]), a GPU's is
the CUDA plugin of jax (the extra [cuda]); neither needs the hardware.
"""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.plan import gpu_target
from moe_jax.plan.chips import CHIPS, Chip

CPU = "cpu"
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
_WRITTEN = re.compile(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)")
# libtpu asks the machine for these where nobody says them. Two plans may compile at a time: they
# take no chip, which the lock of libtpu is for.
_TPU_VARIABLES = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Topology(NamedTuple):
    """Holds what a text names."""

    text: str
    slices: int
    # None for the CPU.
    chip: Chip | None
    # Chips in every dimension of a slice, or (hosts, GPUs).
    shape: tuple[int, ...]

    @property
    def num_devices(self) -> int:
        number = self.slices
        for length in self.shape:
            number *= length
        return number * (self.chip.per_chip if self.chip else 1)


def parse(text: str) -> Topology:
    """Returns the topology of a text. Raises UserError for one that nobody knows."""
    written = _WRITTEN.fullmatch(text)
    name = written[2] if written else text.partition(":")[0]
    if not written or (name != CPU and name not in CHIPS):
        raise UserError(
            f"--topology {text}: write {CPU}:N, or one of {', '.join(CHIPS)} with its shape, as in "
            "v5e:4x4, 2*v5p:4x4x4 or h100:8x8 (hosts x GPUs)"
        )
    chip = CHIPS.get(name)
    shape = tuple(int(length) for length in written[3].split("x"))
    slices = int(written[1] or 1)
    if chip is None or not chip.torus:
        # CPU devices have a number, GPUs (hosts, GPUs of a host).
        most = 1 if chip is None else 2
        if len(shape) > most or slices > 1:
            right = f"{name}:8" if chip is None else f"{name}:8x8 (hosts x GPUs)"
            raise UserError(f"--topology {text}: write {right}")
    elif len(shape) != chip.torus:
        example = "x".join(["4"] * chip.torus)
        raise UserError(
            f"--topology {text}: a slice of {name} has {chip.torus} dimensions, as in "
            f"{name}:{example}"
        )
    if 0 in shape or not slices:
        raise UserError(f"--topology {text}: every length is at least 1")
    return Topology(text, slices, chip, shape)


def devices(topology: Topology) -> Sequence[Any]:
    """Returns the devices, in the order of jax. Raises UserError where a compiler is missing.

    It must come before jax looks for devices: only the CPU of this machine is used.
    """
    if topology.chip is None:
        mesh.simulate(topology.num_devices)
        return jax.devices()[: topology.num_devices]
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.torus:
        return _tpus(topology)
    return _gpus(topology, topology.chip)


def _tpus(topology: Topology) -> Sequence[Any]:
    _require(topology, "tpu", "libtpu", ("libtpu",))
    for name, value in _TPU_VARIABLES.items():
        # What the user has set stays.
        os.environ.setdefault(name, value)
    # One slice is described without their number.
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    name = topology.text.rpartition("*")[2]
    with _refused(topology):
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices)
    return described.devices


def _gpus(topology: Topology, chip: Chip) -> Sequence[Any]:
    _require(topology, "cuda", "the CUDA plugin of jax", PLUGINS)
    # The libraries of CUDA itself are not needed to compile.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    # One number alone is of one host.
    hosts, per_host = topology.shape if len(topology.shape) == 2 else (1, *topology.shape)
    shape = f"1x{hosts}x{per_host}"
    with _refused(topology):
        described = topologies.get_topology_desc(
            shape, platform="cuda", target_config=gpu_target.text(chip), topology=shape
        )
    return described.devices


def _require(topology: Topology, extra: str, what: str, modules: tuple[str, ...]) -> None:
    """Raises UserError where none of the modules that have a compiler is installed."""
    if not any(importlib.util.find_spec(name) for name in modules):
        raise UserError(
            f"--topology {topology.text} is compiled by {what}, which is not installed: install "
            f"moe_jax with its extra [{extra}], or plan with --topology cpu:8"
        )


@contextlib.contextmanager
def _refused(topology: Topology) -> Iterator[None]:
    """Tells in a line what a compiler says of a topology that it does not know."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--topology {topology.text}: {reason}") from error
