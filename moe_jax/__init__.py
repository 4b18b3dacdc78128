"""Sparse Mixture-of-Experts transformers in JAX: parallelism that is proven, routing that can be
seen.

    MoELayer     routed experts for your own flax nnx model
    ROUTERS      the routers by name, and the contract of each
    load_run     a finished run as objects: config, parameters, model, tokenizer
    train        training: `train.from_config("quickstart", "runs/x")`
    verify       the proof: `verify.from_config("quickstart")`

The names are imported when they are first used, so `import moe_jax` does not import jax.
"""

import importlib
import time
from typing import TYPE_CHECKING, Any

from moe_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from moe_jax import train, verify
    from moe_jax.library import MoELayer
    from moe_jax.moe.routing import ROUTERS
    from moe_jax.run import load_run

__all__ = ["ROUTERS", "MoELayer", "load_run", "train", "verify"]

# Of the process, nearly: "first step after ..." counts imports too.
STARTED = time.monotonic()
_MODULES = {"MoELayer": "library", "ROUTERS": "moe.routing", "load_run": "run"}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name in ("train", "verify"):
        return importlib.import_module(f"moe_jax.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moe_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
