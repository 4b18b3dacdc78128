"""Shazeer et al. 2017 (arXiv:1701.06538), eq. 6-7: the squared coefficient of variation of each
expert's sum of gates.

CV(I)^2 = var(I) / mean(I)^2 = C sum_e (I_e / sum I)^2 - 1, with the variance over all C (not C
- 1). 0 when balanced, at most C - 1.
"""

import jax

from moe_jax.moe.losses.contract import Loss, Totals, variation


def value(totals: Totals) -> jax.Array:
    """Returns the loss of each MoE layer, [L]."""
    return variation(totals["importance"])


LOSS = Loss(value, 0.0, "of Shazeer's importance loss (CV^2 of the sums of gates)", balances=True)
