"""The SwiGLU of gpt-oss (arXiv:2508.10925, section 2; the formula is that of the released code):

g = min(gate, limit),  u = clip(up, -limit, limit)
(u + 1) * g * sigmoid(alpha * g)
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.moe.activations.contract import Activation
from moe_jax.schema.options import POSITIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    alpha: float = option(1.702, "factor inside the sigmoid", POSITIVE)
    limit: float = option(7.0, "gate is at most so large, up between minus it and it", POSITIVE)


def of(options: Options, gate: Array, up: Array) -> Array:
    gate = jnp.minimum(gate, options.limit)
    up = jnp.clip(up, -options.limit, options.limit)
    return (up + 1) * gate * jax.nn.sigmoid(options.alpha * gate)


def reference(options: Options, gate: Array, up: Array) -> Array:
    gate = jnp.where(gate > options.limit, options.limit, gate)
    bounded = jnp.where(jnp.abs(up) > options.limit, jnp.sign(up) * options.limit, up)
    return gate * (bounded + 1) / (1 + jnp.exp(-options.alpha * gate))


ACTIVATION = Activation(Options, 2, of, reference)
