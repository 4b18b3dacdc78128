"""Learning-rate schedules: (cfg, options) -> (step -> learning rate). A new one is a function and a line in SCHEDULES.

All begin with the same warm-up: learning_rate * step / warmup_steps for step < warmup_steps. Each docstring gives the
factor on learning_rate after it, where t = (step - warmup_steps) / (steps - warmup_steps). After `steps` the last value
stays.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.config import OptimConfig
from moe_jax.errors import UserError

Schedule = Callable[[Any], jax.Array]


def cosine(cfg: OptimConfig, *, final_fraction: float) -> Schedule:
    """f + (1 - f) (1 + cos(pi t)) / 2, f = final_fraction (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5)."""
    return _warmed(cfg, lambda step, t: final_fraction + (1 - final_fraction) * (1 + jnp.cos(jnp.pi * t)) / 2)


def linear(cfg: OptimConfig, *, final_fraction: float) -> Schedule:
    """1 - (1 - f) t, f = final_fraction."""
    return _warmed(cfg, lambda step, t: 1 - (1 - final_fraction) * t)


def wsd(cfg: OptimConfig, *, decay_fraction: float, final_fraction: float, shape: str) -> Schedule:
    """Warm-up, stable, decay: 1 until the last `decay_fraction` of all steps, then 1 - (1 - f) d(u).

    f = final_fraction; u runs from 0 to 1 over the decay; d(u) = u ("linear", arXiv:2404.06395) or sqrt(u) ("sqrt",
    arXiv:2405.18392).
    """
    if shape not in ("linear", "sqrt"):
        raise UserError(f'optim.schedules.wsd.shape = "{shape}" is not known: choose one of linear, sqrt')
    length = decay_fraction * cfg.steps
    if not 0 <= decay_fraction <= 1 or length > cfg.steps - cfg.warmup_steps:
        raise UserError(
            f"optim.schedules.wsd.decay_fraction = {decay_fraction} is {length:g} of train.steps = {cfg.steps}, "
            f"and leaves no room for optim.warmup_steps = {cfg.warmup_steps}: lower one of them"
        )

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
    def rate(step: Any) -> jax.Array:
        step = jnp.minimum(jnp.asarray(step, float), cfg.steps)
        t = jnp.clip((step - cfg.warmup_steps) / max(cfg.steps - cfg.warmup_steps, 1), 0, 1)
        warm = step / max(cfg.warmup_steps, 1)
        return cfg.learning_rate * jnp.where(step < cfg.warmup_steps, warm, factor(step, t))

    return rate
