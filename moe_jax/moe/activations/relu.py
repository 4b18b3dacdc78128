"""ReLU: the feed-forward of the first Transformer (Vaswani et al. 2017, arXiv:1706.03762, section
3.3), of T5 (arXiv:1910.10683) and of Switch Transformers (arXiv:2101.03961).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.moe.activations.contract import Activation


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def of(options: Options, hidden: Array) -> Array:
    del options
    return jax.nn.relu(hidden)


def reference(options: Options, hidden: Array) -> Array:
    del options
    return jnp.where(hidden > 0, hidden, 0)


ACTIVATION = Activation(Options, 1, of, reference)
