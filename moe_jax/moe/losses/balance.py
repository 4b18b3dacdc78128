"""Switch's load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6), for k choices, of
the global batch.

C sum_e f_e P_e: f_e = assignments to e / all assignments (sum f = 1 for every k), P_e = mean
router probability of e; both over all valid tokens of the optimizer step, all devices and
micro-batches ("global-batch", Qiu et al. 2025, arXiv:2501.11873). 1 when balanced, at most C /
k.
"""

import jax

from moe_jax.moe.load import balanced_counts, product
from moe_jax.moe.losses.contract import Loss, Totals


def value(totals: Totals) -> jax.Array:
    """Returns the loss of each MoE layer, [L]."""
    return product(balanced_counts(totals), totals["probs"], totals["tokens"])


LOSS = Loss(
    value,
    0.01,
    "coefficient of Switch's load-balancing loss over the global batch; all of these: "
    "docs/balance.md",
    balances=True,
)
