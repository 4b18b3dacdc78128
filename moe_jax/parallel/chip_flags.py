"""Flags of XLA for a kind of chip: collectives that run while the device computes, and nothing that
is computed again beyond what model.remat says.

This is the only place with such flags. They change when things happen and not what is computed, and
`chip_flags = False` leaves the compiler as it is. A flag that a compiler does not know is an error
of that compiler, so each is here because libtpu 0.0.42 and the CUDA plugin of jax 0.10.2 take it.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

# What a device_kind begins with -> flags. The compiler of CPUs has none of this kind.
FLAGS: dict[str, dict[str, Any]] = {
    "TPU": {
        # A collective is cut into steps that run beside the products around it.
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        # Rows travel to their experts while others compute (docs/exchange.md).
        "xla_tpu_enable_async_all_to_all": True,
        "xla_tpu_enable_async_ragged_all_to_all": True,
    },
    "NVIDIA": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # A loop over layers gathers the weights of the next layer while it computes this one.
        "xla_gpu_enable_while_loop_double_buffering": True,
        # Where XLA expects too little memory, it computes again. It takes the program of large
        # models for half as large again as it gets, and repeated products in the loops of their
        # experts for nothing: of Mixtral half of them, for 0.2 GB of 72 (docs/plan.md).
        "xla_disable_hlo_passes": "rematerialization",
    },
}


def of(mesh: Mesh, enabled: bool) -> Mapping[str, Any]:
    """Returns the flags for the devices of a mesh; none where they are not enabled."""
    if not enabled:
        return {}
    return of_kind(mesh.devices.flat[0].device_kind)


def of_kind(device_kind: str) -> Mapping[str, Any]:
    """Returns the flags of a kind of device."""
    for kind, flags in FLAGS.items():
        if device_kind.startswith(kind):
            return flags
    return {}


def text(flags: Mapping[str, Any]) -> str:
    """Returns flags in one line, "" for none."""
    return " ".join(f"{name}={str(value).lower()}" for name, value in flags.items())
