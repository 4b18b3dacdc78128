"""The training step of a config, compiled for the devices of the current mesh, which need not be
there: everything is abstract.
"""

import time
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax

from moe_jax import train_step
from moe_jax.errors import UserError
from moe_jax.parallel import device_memory
from moe_jax.plan.abstract import batch_of
from moe_jax.schema.config import Config


class TooLarge(UserError):
    """The compiler stops, because a step needs more memory than a device has."""

    code: ClassVar[int] = 1


class Step(NamedTuple):
    """A step that is compiled and never run."""

    abstract_state: train_step.State
    # jax.stages.Compiled.
    compiled: Any
    # Seconds that tracing and lowering took, and the compiler.
    lower_seconds: float
    compile_seconds: float


def abstract_state(cfg: Config, functions: train_step.Model) -> train_step.State:
    """Returns the shapes and shardings of a state on the current mesh."""
    # No key is drawn: devices that are only described compute nothing.
    key = jax.eval_shape(jax.random.key, 0)
    return jax.eval_shape(train_step.initial(cfg, functions), key)


def compile_step(cfg: Config, options: Mapping[str, Any] | None = None) -> Step:
    """Compiles the step that training runs, on the current mesh; allocates nothing.

    Raises TooLarge where the compiler finds that a step does not fit.

    `options`: of the compiler, by name, beside the flags of the chips.
    """
    start = time.perf_counter()
    functions = train_step.make_model(cfg.model)
    state = abstract_state(cfg, functions)
    optimizer = train_step.make_tx(cfg, state.params)
    step = train_step.jit_step(cfg, functions, optimizer)
    lowered = step.lower(state, batch_of(cfg))
    lowered_at = time.perf_counter()
    options = dict(options or {}) | _of_described(jax.sharding.get_mesh().devices.flat[0])
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if reason := device_memory.exhausted(error):
            raise TooLarge(f"mesh {cfg.mesh}: {reason}") from None
        raise
    return Step(state, compiled, lowered_at - start, time.perf_counter() - lowered_at)


def _of_described(device: Any) -> dict[str, Any]:
    """Returns what a compiler must be told because the device is not there: GPU kernels are chosen
    by timing them.
    """
    if device.platform in ("cuda", "gpu") and device not in jax.devices():
        return {"xla_gpu_autotune_level": "0"}
    return {}
