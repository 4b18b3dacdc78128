"""1 - (1 - f) t, f = final_fraction."""

import dataclasses

import jax

from moe_jax.optim.schedules.contract import Factor, Schedule
from moe_jax.schema.options import FRACTION, option
from moe_jax.schema.training import OptimConfig


@dataclasses.dataclass(frozen=True)
class Options:
    final_fraction: float = option(0.0, "of the learning rate, at the last step", FRACTION)


def factor(cfg: OptimConfig, options: Options) -> Factor:
    """Returns a straight line."""
    del cfg

    def of_step(step: jax.Array, t: jax.Array) -> jax.Array:
        del step
        return 1 - (1 - options.final_fraction) * t

    return of_step


SCHEDULE = Schedule(Options, factor)
