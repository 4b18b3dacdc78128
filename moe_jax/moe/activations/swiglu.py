"""SwiGLU: silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.moe.activations.contract import Activation


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def of(options: Options, gate: Array, up: Array) -> Array:
    del options
    return jax.nn.silu(gate) * up


def reference(options: Options, gate: Array, up: Array) -> Array:
    """Returns silu(x) = x / (1 + exp(-x)), written out."""
    del options
    return gate / (1 + jnp.exp(-gate)) * up


def lean(options: Options, gate: Array, up: Array) -> Array:
    """Returns the same, of which the backward pass keeps gate and up alone."""
    del options
    return _swiglu(gate, up)


@jax.custom_vjp
def _swiglu(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return _swiglu(gate, up), (gate, up)


def _backward(residuals: tuple[Array, Array], dh: Array) -> tuple[Array, Array]:
    gate, up = residuals
    # The sigmoid is computed again: to keep it takes longer. Written in another way than forward,
    # for XLA would see that it is the same, and keep it.
    small = jnp.exp(-jnp.abs(gate))
    sigmoid = jnp.where(gate >= 0, 1, small) / (1 + small)
    silu = gate * sigmoid
    return dh * up * (sigmoid + silu * (1 - sigmoid)), dh * silu


_swiglu.defvjp(_forward, _backward)


ACTIVATION = Activation(Options, 2, of, reference, lean)
