"""What a schedule is: (cfg, options) -> (step -> learning rate).

All begin with the same warm-up: learning_rate * step / w for step < w, where w = `warmup(cfg)`:
warmup_steps, or less where the run has no room for that. Each file gives the factor on
learning_rate after it, where t = (step - w) / (steps - w). After `steps` the last value stays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moe_jax.schema.training import OptimConfig

Rate = Callable[[Any], jax.Array]
Factor = Callable[[jax.Array, jax.Array], jax.Array]


def no_decay(options: Any) -> float:
    """Says that a schedule keeps no part of the run for its decay."""
    del options
    return 0.0


class Schedule(NamedTuple):
    """Holds all that there is to know of a schedule; `SCHEDULE` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    # (cfg, options) -> (step, t) -> the factor on the learning rate after the warm-up.
    factor: Callable[[OptimConfig, Any], Factor]
    # Options -> the fraction of all steps, at the end, that the warm-up must not reach into.
    decay_fraction: Callable[[Any], float] = no_decay
