"""Shazeer et al. 2017 (arXiv:1701.06538), eq. 10-11: as `importance`, of the smooth load.

The load of an expert is the sum over tokens of P(x, e), the probability that e is among the
chosen under fresh noise; only a router with noise (noisy_top_k) has it. 0 when balanced, at
most C / k - 1, as no expert is chosen more than once by a token.
"""

import jax

from moe_jax.moe.losses.contract import Loss, Totals, variation


def value(totals: Totals) -> jax.Array:
    """Returns the loss of each MoE layer, [L]."""
    return variation(totals["load"])


LOSS = Loss(
    value,
    0.0,
    "of Shazeer's load loss (CV^2 of the smooth load); router noisy_top_k only",
    balances=True,
    needs="load",
)
