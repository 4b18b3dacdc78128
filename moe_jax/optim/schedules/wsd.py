"""Warm-up, stable, decay.

The factor is 1 until the last `decay_fraction` of all steps, then 1 - (1 - f) d(u).

f = final_fraction; u runs from 0 to 1 over the decay; d(u) = u ("linear", arXiv:2404.06395) or
sqrt(u) ("sqrt", arXiv:2405.18392).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.optim.schedules.contract import Factor, Schedule
from moe_jax.schema.options import FRACTION, option
from moe_jax.schema.training import OptimConfig


@dataclasses.dataclass(frozen=True)
class Options:
    decay_fraction: float = option(0.2, "of all steps, at the end", FRACTION)
    final_fraction: float = option(0.0, "of the learning rate, at the last step", FRACTION)
    shape: str = option("linear", 'of the decay: "linear" or "sqrt"', choices=("linear", "sqrt"))


def factor(cfg: OptimConfig, options: Options) -> Factor:
    """Returns 1, and then the decay."""
    length = options.decay_fraction * cfg.steps

    def of_step(step: jax.Array, t: jax.Array) -> jax.Array:
        del t
        # 0 until the decay begins, `length` steps before the end.
        u = jnp.clip((step - (cfg.steps - length)) / max(length, 1), 0, 1)
        decay = jnp.sqrt(u) if options.shape == "sqrt" else u
        return 1 - (1 - options.final_fraction) * decay

    return of_step


def decay_fraction(options: Options) -> float:
    """Returns the fraction of all steps that decay."""
    return options.decay_fraction


SCHEDULE = Schedule(Options, factor, decay_fraction)
