"""GEGLU: gelu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6), with the tanh approximation, as
in Gemma 2 (arXiv:2408.00118).
"""

import dataclasses

import jax
from jax import Array

from moe_jax.moe.activations.contract import Activation
from moe_jax.moe.activations.gelu import written_out


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def of(options: Options, gate: Array, up: Array) -> Array:
    del options
    return jax.nn.gelu(gate) * up


def reference(options: Options, gate: Array, up: Array) -> Array:
    del options
    return written_out(gate) * up


ACTIVATION = Activation(Options, 2, of, reference)
