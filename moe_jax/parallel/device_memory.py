"""The memory of a device: how much it has, and what jax says when it is too small."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from moe_jax.errors import UserError

# How jax names it, on every platform, when a program is compiled and when it runs.
_EXHAUSTED = "RESOURCE_EXHAUSTED: "
_WAYS_OUT = "Take more devices, a smaller train.micro_batch_size, or a model.remat that keeps less"
# The limit of a container, in bytes or "max".
_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def of_each(devices: Sequence[Any]) -> int | None:
    """Returns the bytes that each of the devices of this process has; None where jax does not say.

    Devices of a CPU share the memory of the machine, or of the container.
    """
    if devices[0].platform != "cpu":
        return (devices[0].memory_stats() or {}).get("bytes_limit")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, _of_container() or machine) // len(devices)


def _of_container() -> int | None:
    try:
        limit = _CONTAINER.read_text().strip()
    except OSError:
        return None
    return int(limit) if limit.isdecimal() else None


def refuse_too_large(num_bytes: int, devices: Sequence[Any]) -> None:
    """Raises UserError where a state of `num_bytes` a device cannot be held by the devices.

    Linux gives more memory than it has, and kills a process that uses it without a word.
    """
    has = of_each(devices)
    if has is not None and num_bytes > has:
        raise UserError(
            f"the state of this run, parameters and moments, takes {decimal(num_bytes)} of each "
            f"device, which has {decimal(has)}: take more devices (mesh) or a smaller model. "
            "`python -m moe_jax plan` says what fits where"
        )


def exhausted(error: Exception) -> str:
    """Returns in one line that the memory of a device is too small, and the way out; "" where an
    error says something else.
    """
    _, found, rest = str(error).partition(_EXHAUSTED)
    if not found:
        return ""
    return f"this does not fit into the memory of a device: {rest.splitlines()[0]} {_WAYS_OUT}"
