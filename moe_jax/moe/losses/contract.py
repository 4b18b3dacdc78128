"""What an auxiliary loss is.

A coefficient is `model.moe.losses.NAME`; what is added is coefficient x the mean over the MoE
layers, so that a coefficient means the same at every depth. Every loss is a function of sums over
valid tokens (moe/load.py): none depends on the mesh, only `micro_batch_balance` on accumulation.

Shapes: L MoE layers, C classes that are counted (E experts, and null experts where there are any).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Totals = Mapping[str, jax.Array]


class Loss(NamedTuple):
    """Holds all that there is to know of a loss; `LOSS` of its file."""

    # totals -> [L]
    value: Callable[[Totals], jax.Array]
    # Its default, and what the config says of it.
    coefficient: float
    comment: str
    # It asks for balance: the adaptive weight multiplies it, and a router with a balance of its own
    # does not want it.
    balances: bool
    # The sum that it is made of, where not every router gives it (`Router.sums`).
    needs: str = ""
    # By its definition it changes with the number of micro-batches.
    of_micro_batches: bool = False
    # It is a sum over how many there are (tokens, rows, micro-batches) and no product of sums, so
    # that gradients of micro-batches add up to that of the batch (accumulation.py).
    adds_up: bool = False


def variation(x_LC: jax.Array) -> jax.Array:
    """Returns the squared coefficient of variation over the classes, [L]; 0 where all are 0."""
    mean_L = x_LC.mean(-1)
    variance_L = jnp.square(x_LC - mean_L[:, None]).mean(-1)
    # Where all are 0 the variance is 0 as well: the bound keeps 0 / 0 away.
    return variance_L / jnp.maximum(jnp.square(mean_L), 1e-30)
