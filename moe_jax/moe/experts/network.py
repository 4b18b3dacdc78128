"""The feed-forward network of an expert, and what the kernels that compute it are given.

    y = (activation(x @ w_in) * gate) @ w_out

Shapes: R rows of all experts, B rows of some, e experts on this device, D model, F expert hidden, P
parts of the first weight (2: gate and up, 1 otherwise), H = P * F pre-activations of a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


def swiglu(pre_BH: Array) -> Array:
    """Returns silu(gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 6).

    `pre_BH` holds the gate in its first half and up in its second.
    """
    gate_BF, up_BF = jnp.split(pre_BH, 2, axis=-1)
    return jax.nn.silu(gate_BF) * up_BF


def gelu(pre_BH: Array) -> Array:
    """Returns GELU in its tanh approximation."""
    return jax.nn.gelu(pre_BH)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"swiglu": swiglu, "gelu": gelu}
PARTS = {"swiglu": 2, "gelu": 1}


class Rows(NamedTuple):
    """Holds what a kernel works on; cotangents have the same structure."""

    x_RD: Array
    gate_R: Array
    w_in_eDH: Array
    w_out_eFD: Array


class Layout(NamedTuple):
    """Says where the rows of each expert are: [start, start + size)."""

    start_e: Array
    size_e: Array
