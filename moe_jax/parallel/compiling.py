"""Quick compilation, where that is most of the time (proofs, tests, short runs), and code that
differs by platform.

LLVM's optimisations are off and loops are emitted without MLIR: a third of the time of a usual
compilation. XLA's own passes, which decide what is fused and which collectives run, are those of a
usual run.
"""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

# jaxlib 0.12 has no other emitters than those of MLIR, and ends the process at a flag that it does
# not know.
_OLD_EMITTERS = (
    {}
    if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 12)
    else {"xla_cpu_use_fusion_emitters": False}
)
_LEVEL = "xla_backend_optimization_level"
# For `jit(...).lower(...).compile(compiler_options=QUICK)`; `Any` because jax types each value.
QUICK: Any = {_LEVEL: 0, **_OLD_EMITTERS}


def runs_once() -> dict[str, Any]:
    """Returns the `compiler_options` of a program that runs once, such as the first parameters.

    On a CPU LLVM optimises less: what draws the parameters of the quickstart compiles in 2.2 s
    instead of 6.4 s, runs as fast, and gives the same bits. Flags of the user are kept.
    """
    if platform() != "cpu" or _LEVEL in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {_LEVEL: 1}


_others: contextvars.ContextVar[bool] = contextvars.ContextVar("others", default=False)


def by_platform(*args: Any, others: Callable[..., Any], **own: Callable[..., Any]) -> Any:
    """Returns what the function of the platform gives for `args`, whichever it is compiled for.

    `own` has functions by the names of their platforms (cpu, tpu); `others` serves every other
    platform, GPUs among them.
    """
    import jax  # here: tests set flags that are read when jax loads

    if _others.get():
        return others(*args)
    known = _platform_of_mesh()
    # The code of every platform was a third of the tracing of a step.
    if known is not None:
        return own.get(known, others)(*args)
    return jax.lax.platform_dependent(*args, **own, default=others)


def platform() -> str:
    """Returns the platform of the current mesh, which is what is compiled for: "cpu", "tpu", "gpu".

    For sizes, which must be known when the program is traced; "cpu" where no mesh is set.
    """
    return _platform_of_mesh() or "cpu"


def device_kind() -> str | None:
    """Returns the kind of the devices of the current mesh ("NVIDIA H100 80GB HBM3"), which is what
    is compiled for, or None where no mesh is set.
    """
    device = _device_of_mesh()
    return device.device_kind if device else None


def _platform_of_mesh() -> str | None:
    """Returns the platform of the devices of the current mesh, or None where no mesh is set."""
    device = _device_of_mesh()
    return device.platform if device else None


def _device_of_mesh() -> Any:
    """Returns what is known of the devices of the current mesh, or None where no mesh is set."""
    import jax  # here: as above

    return jax.sharding.get_abstract_mesh().abstract_device


@contextlib.contextmanager
def of_other_platforms() -> Iterator[None]:
    """Makes what is traced inside take the code of accelerators, so that a CPU can check it."""
    token = _others.set(True)
    try:
        yield
    finally:
        _others.reset(token)


def as_flags(options: Mapping[str, Any]) -> str:
    """Returns the same for the environment variable XLA_FLAGS, which is read when jax first looks
    for devices.
    """
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
