"""A soft cap: cap * tanh(x / cap) is nearly x where that is small, and never beyond the cap
(Gemma 2, arXiv:2408.00118, section 2). Of the scores of attention (`model.attention_cap`), and of
the logits of the head (`model.logit_cap`). A cap of 0 is none.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array


def soft_cap(x: Array, cap: float) -> Array:
    """Returns cap * tanh(x / cap); x itself where there is no cap."""
    return cap * jnp.tanh(x / cap) if cap else x


def pulled_back(dy: Array, y: Array, cap: float) -> Array:
    """Returns the gradient of what was capped, from that of the result y = soft_cap(x, cap)."""
    # The derivative of tanh is 1 - tanh^2, and y / cap is the tanh.
    return dy * (1 - jnp.square(y / cap)) if cap else dy


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def lean_soft_cap(x: Array, cap: float) -> Array:
    """Returns the same, of which the backward pass reads the result alone: beside the widest arrays
    of a model it keeps no tanh.
    """
    return soft_cap(x, cap)


def _forward(x: Array, cap: float) -> tuple[Array, Array]:
    y = soft_cap(x, cap)
    return y, y


def _backward(cap: float, y: Array, dy: Array) -> tuple[Array]:
    return (pulled_back(dy, y, cap),)


lean_soft_cap.defvjp(_forward, _backward)
