"""How XLA compiles for a CPU where compilation is most of the time: proofs, tests, short runs.

LLVM's optimisations are off and loops are emitted without MLIR: a third of the time of a usual compilation. XLA's own passes, which decide
what is fused and which collectives run, are those of a usual run.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

# jaxlib 0.12 has no other emitters than those of MLIR, and ends the process at a flag that it does not know.
_OLD_EMITTERS = (
    {} if tuple(map(int, version("jaxlib").split(".")[:2])) >= (0, 12) else {"xla_cpu_use_fusion_emitters": False}
)
# For `jit(...).lower(...).compile(compiler_options=QUICK)`; `Any` because jax types each value.
QUICK: Any = {"xla_backend_optimization_level": 0, **_OLD_EMITTERS}


def as_flags(options: Mapping[str, Any]) -> str:
    """The same for the environment variable XLA_FLAGS, which is read when jax first looks for devices."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
