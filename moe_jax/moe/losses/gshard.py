"""GShard's auxiliary loss (Lepikhin et al. 2020, arXiv:2006.16668, section 2.2, algorithm 1), of
the global batch.

(1 / C) sum_e (c_e / S) m_e: c_e = tokens whose *first* choice is e, before any capacity; m_e =
mean router probability of e; S = valid tokens. 1 / C^2 when balanced, at most 1 / C: C^2 times
this is Switch's loss of the first choices. GShard takes it per group of tokens.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.losses.contract import Loss, Totals


def value(totals: Totals) -> jax.Array:
    """Returns the loss of each MoE layer, [L]."""
    tokens_L1 = jnp.maximum(totals["tokens"], 1)[:, None]
    first_fraction_LC = totals["first"] / tokens_L1
    mean_prob_LC = totals["probs"] / tokens_L1
    return (first_fraction_LC * mean_prob_LC).mean(-1)


LOSS = Loss(
    value, 0.0, "of GShard's loss (first choices, 1 / experts^2 when balanced)", balances=True
)
