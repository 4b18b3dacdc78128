"""GELU, in its tanh approximation (Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.moe.activations.contract import Activation


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def of(options: Options, hidden: Array) -> Array:
    del options
    return jax.nn.gelu(hidden)


def written_out(x: Array) -> Array:
    """Returns x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    return x / 2 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(options: Options, hidden: Array) -> Array:
    del options
    return written_out(hidden)


ACTIVATION = Activation(Options, 1, of, reference)
