"""Learning-rate schedules:

(cfg, options) -> (step -> learning rate). A new one is a function and a line in SCHEDULES.

All begin with the same warm-up: learning_rate * step / w for step < w, where w = `warmup(cfg)`:
warmup_steps, or less where the run has no room for that. Each docstring gives the factor on
learning_rate after it, where t = (step - w) / (steps - w). After `steps` the last value stays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError
from moe_jax.schema.config import OptimConfig

Schedule = Callable[[Any], jax.Array]


def warmup(cfg: OptimConfig) -> int:
    """Steps of the warm-up: optim.warmup_steps, or half of the room that a shorter run has for it.

    The room is the whole run but the decay of wsd. Half of it, so that a short run comes to its
    peak and moves parameters.
    """
    room = cfg.steps - _decay_length(cfg)
    return cfg.warmup_steps if cfg.warmup_steps <= room else int(room / 2)


def warmup_note(cfg: OptimConfig) -> str:
    """What a run is told whose warm-up is cut; "" where there is room for it."""
    if warmup(cfg) == cfg.warmup_steps:
        return ""
    length = _decay_length(cfg)
    decay = f", of which {cfg.schedule} decays over {length:g}" if length else ""
    return (
        f"optim.warmup_steps = {cfg.warmup_steps} does not fit into train.steps = "
        f"{cfg.steps}{decay}: "
        f"the warm-up takes {warmup(cfg)}"
    )


def _decay_length(cfg: OptimConfig) -> float:
    """Steps at the end of the run that a schedule keeps for its decay, which the warm-up must not
    reach into.
    """
    return cfg.schedule_options.get("decay_fraction", 0.0) * cfg.steps


def cosine(cfg: OptimConfig, *, final_fraction: float) -> Schedule:
    """f + (1 - f) (1 + cos(pi t)) / 2, f = final_fraction (Loshchilov & Hutter 2017,
    arXiv:1608.03983, equation 5).
    """
    return _warmed(
        cfg, lambda step, t: final_fraction + (1 - final_fraction) * (1 + jnp.cos(jnp.pi * t)) / 2
    )


def linear(cfg: OptimConfig, *, final_fraction: float) -> Schedule:
    """1 - (1 - f) t, f = final_fraction."""
    return _warmed(cfg, lambda step, t: 1 - (1 - final_fraction) * t)


def wsd(cfg: OptimConfig, *, decay_fraction: float, final_fraction: float, shape: str) -> Schedule:
    """Warm-up, stable, decay:

    1 until the last `decay_fraction` of all steps, then 1 - (1 - f) d(u).

    f = final_fraction; u runs from 0 to 1 over the decay; d(u) = u ("linear", arXiv:2404.06395) or
    sqrt(u) ("sqrt", arXiv:2405.18392).
    """
    if shape not in ("linear", "sqrt"):
        raise UserError(
            f'optim.schedules.wsd.shape = "{shape}" is not known: choose one of linear, sqrt'
        )
    if not 0 <= decay_fraction <= 1:
        raise UserError(
            f"optim.schedules.wsd.decay_fraction = {decay_fraction} must lie between 0 and 1"
        )
    length = decay_fraction * cfg.steps

    def factor(step: jax.Array, t: jax.Array) -> jax.Array:
        u = jnp.clip((step - (cfg.steps - length)) / max(length, 1), 0, 1)
        return 1 - (1 - final_fraction) * (jnp.sqrt(u) if shape == "sqrt" else u)

    return _warmed(cfg, factor)


def constant(cfg: OptimConfig) -> Schedule:
    """1."""
    return _warmed(cfg, lambda step, t: jnp.ones_like(step))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "wsd": wsd,
    "linear": linear,
    "constant": constant,
}


def _warmed(cfg: OptimConfig, factor: Callable[[jax.Array, jax.Array], jax.Array]) -> Schedule:
    warm_steps = warmup(cfg)

    def rate(step: Any) -> jax.Array:
        step = jnp.minimum(jnp.asarray(step, float), cfg.steps)
        t = jnp.clip((step - warm_steps) / max(cfg.steps - warm_steps, 1), 0, 1)
        warm = step / max(warm_steps, 1)
        return cfg.learning_rate * jnp.where(step < warm_steps, warm, factor(step, t))

    return rate
