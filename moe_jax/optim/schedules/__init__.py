"""Learning-rate schedules. A new one is a file here and a line in SCHEDULES; see contract.py."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.optim.schedules import constant, cosine, linear, wsd
from moe_jax.optim.schedules.contract import Rate, Schedule
from moe_jax.schema.training import OptimConfig

SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine.SCHEDULE,
    "wsd": wsd.SCHEDULE,
    "linear": linear.SCHEDULE,
    "constant": constant.SCHEDULE,
}


def warmup(cfg: OptimConfig) -> int:
    """Returns the steps of the warm-up: optim.warmup_steps, or half of the room of a shorter run.

    The room is the whole run but the decay of wsd. Half of it, so that a short run comes to its
    peak and moves parameters.
    """
    room = cfg.steps - _decay_length(cfg)
    return cfg.warmup_steps if cfg.warmup_steps <= room else int(room / 2)


def warmup_note(cfg: OptimConfig) -> str:
    """Returns what a run is told whose warm-up is cut; "" where there is room for it."""
    if warmup(cfg) == cfg.warmup_steps:
        return ""
    length = _decay_length(cfg)
    decay = f", of which {cfg.schedule} decays over {length:g}" if length else ""
    return (
        f"optim.warmup_steps = {cfg.warmup_steps} does not fit into train.steps = "
        f"{cfg.steps}{decay}: the warm-up takes {warmup(cfg)}"
    )


def _decay_length(cfg: OptimConfig) -> float:
    """Returns the steps at the end of the run that a schedule keeps for its decay."""
    return SCHEDULES[cfg.schedule].decay_fraction(cfg.schedule_options) * cfg.steps


def rate(cfg: OptimConfig) -> Rate:
    """Returns the function step -> learning rate of a config; step 0 is the first update."""
    warm_steps = warmup(cfg)
    factor = SCHEDULES[cfg.schedule].factor(cfg, cfg.schedule_options)

    def of_step(step: Any) -> jax.Array:
        # After the last step of the schedule its last value stays.
        step = jnp.minimum(jnp.asarray(step, float), cfg.steps)
        # t runs from 0 after the warm-up to 1 at the end.
        t = jnp.clip((step - warm_steps) / max(cfg.steps - warm_steps, 1), 0, 1)
        warm = step / max(warm_steps, 1)
        return cfg.learning_rate * jnp.where(step < warm_steps, warm, factor(step, t))

    return of_step
