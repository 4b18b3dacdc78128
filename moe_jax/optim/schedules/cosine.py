"""f + (1 - f) (1 + cos(pi t)) / 2, f = final_fraction (Loshchilov & Hutter 2017,
arXiv:1608.03983, equation 5).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.optim.schedules.contract import Factor, Schedule
from moe_jax.schema.options import FRACTION, option
from moe_jax.schema.training import OptimConfig


@dataclasses.dataclass(frozen=True)
class Options:
    final_fraction: float = option(0.1, "of the learning rate, at the last step", FRACTION)


def factor(cfg: OptimConfig, options: Options) -> Factor:
    """Returns half a period of a cosine."""
    del cfg
    final = options.final_fraction

    def of_step(step: jax.Array, t: jax.Array) -> jax.Array:
        del step
        return final + (1 - final) * (1 + jnp.cos(jnp.pi * t)) / 2

    return of_step


SCHEDULE = Schedule(Options, factor)
