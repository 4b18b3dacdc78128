"""The product of `balance` of each micro-batch (all devices) alone, averaged over the
micro-batches that have a valid token.

What plain accumulation optimises ("micro-batch LBL" of arXiv:2501.11873, where a micro-batch is
a device's share besides). It equals `balance` with one micro-batch; by definition it changes
with train.micro_batch_size.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.losses.contract import Loss, Totals


def value(totals: Totals) -> jax.Array:
    """Returns the loss of each MoE layer, [L]."""
    # The product was taken while the micro-batch was alone (moe/load.py): sums over all of them no
    # longer show it.
    return totals["micro_batch_balance"] / jnp.maximum(totals["micro_batches"], 1)


LOSS = Loss(
    value,
    0.0,
    "of Switch's loss of each micro-batch, averaged over micro-batches",
    balances=True,
    of_micro_batches=True,
    adds_up=True,
)
