"""The feed-forward network of an expert, and what the kernels that compute it are given.

    y = gate * (activation(x @ w_in + in_bias) @ w_out + out_bias)

Shapes: R rows of all experts, B rows of some, e experts on this device, D model, F expert hidden, P
parts of the first weight (2: gate and up, 1 otherwise), H = P * F pre-activations of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from moe_jax.moe.activations import ACTIVATIONS


class Chosen(NamedTuple):
    """An activation and its options: what decides the function, and may be compared."""

    activation: str
    # None = the defaults.
    options: Any = None

    @property
    def parts(self) -> int:
        return ACTIVATIONS[self.activation].parts

    def function(self) -> Callable[[Array], Array]:
        """Returns the activation as a function of pre-activations [B, H], whose parts stand side by
        side.
        """
        kind = ACTIVATIONS[self.activation]
        options = kind.options() if self.options is None else self.options

        def act(pre_BH: Array) -> Array:
            return kind.of(options, *jnp.split(pre_BH, kind.parts, axis=-1))

        return act


class Biases(NamedTuple):
    """Of experts that have them."""

    in_eH: Array
    out_eD: Array


class Rows(NamedTuple):
    """Holds what a kernel works on; cotangents have the same structure."""

    x_RD: Array
    gate_R: Array
    w_in_eDH: Array
    w_out_eFD: Array
    # None = without.
    biases: Biases | None = None


class Layout(NamedTuple):
    """Says where the rows of each expert are: [start, start + size)."""

    start_e: Array
    size_e: Array
