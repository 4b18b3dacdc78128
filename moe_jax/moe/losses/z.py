"""Router z-loss (Zoph et al. 2022, ST-MoE, arXiv:2202.08906, eq. 5): mean over valid tokens of
logsumexp(logits)^2.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.losses.contract import Loss, Totals


def value(totals: Totals) -> jax.Array:
    """Returns the loss of each MoE layer, [L]."""
    return totals["z"] / jnp.maximum(totals["tokens"], 1)


LOSS = Loss(value, 0.001, "of the router z-loss (ST-MoE)", balances=False, adds_up=True)
