"""Steps whose loss or gradient norm jumps far above the last ones are not taken.

A bad batch or an unlucky routing can throw a run back by thousands of steps. A step is a spike
when its loss, or its gradient norm, is more than `sigma` standard deviations above the mean of the
last WINDOW steps that were taken (OLMo-core's SkipStepOptimizer; PaLM, Chowdhery et al. 2022,
arXiv:2204.02311, section 5.1, restarted by hand for the same reason). All of it is computed on the
devices: nobody waits for the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128  # steps
# Steps in the window before anything is called a spike.
READY = 32


class Window(NamedTuple):
    """The last steps that were taken. W = WINDOW."""

    # Loss and gradient norm, float32; written in a circle.
    value_2W: jax.Array
    # Steps that were taken so far, int32.
    taken: jax.Array
    # Steps that were not taken, int32.
    spikes: jax.Array


def begin() -> Window:
    """Returns the window of a run that has made no step."""
    return Window(jnp.zeros((2, WINDOW), jnp.float32), jnp.int32(0), jnp.int32(0))


def is_spike(window: Window, loss: jax.Array, norm: jax.Array, sigma: float) -> jax.Array:
    """Returns whether a step is a spike: a bool of shape []."""
    value_2 = jnp.stack([loss, norm]).astype(jnp.float32)
    # Places of the circle that no step has filled yet have no weight.
    filled_W = jnp.arange(WINDOW) < window.taken
    weight_W = filled_W / jnp.maximum(filled_W.sum(), 1).astype(jnp.float32)
    mean_2 = (window.value_2W * weight_W[None]).sum(1)
    variance_2 = (jnp.square(window.value_2W - mean_2[:, None]) * weight_W[None]).sum(1)
    limit_2 = mean_2 + jnp.float32(sigma) * jnp.sqrt(variance_2)
    # An infinite loss is not finite, which is told of by itself; it is not counted twice.
    is_above_2 = jnp.isfinite(value_2) & (value_2 > limit_2)
    return (window.taken >= READY) & is_above_2.any()


def advance(window: Window, loss: jax.Array, norm: jax.Array, spike: jax.Array) -> Window:
    """Returns the window after a step. One that is a spike, or not finite, is not put into it."""
    value_2 = jnp.stack([loss, norm]).astype(jnp.float32)
    takes = ~spike & jnp.isfinite(value_2).all()
    # The oldest of the last WINDOW steps that were taken is overwritten.
    slot = window.taken % WINDOW
    written = window.value_2W.at[:, slot].set(value_2)
    return Window(
        jnp.where(takes, written, window.value_2W),
        window.taken + takes,
        window.spikes + spike,
    )
