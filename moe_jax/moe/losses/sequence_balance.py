"""DeepSeek-V3's sequence-wise loss (DeepSeek-AI 2024, arXiv:2412.19437, eq. 17-20): the mean over
sequences of sum_e f_e P_e.

f_e = C / (K T) x how many of the sequence's T tokens have e among their K largest affinities,
the bias left out (`unbiased`; without a bias these are the assignments), P_e = their mean
probability: Switch's product of each sequence. A sequence is a row of the batch (documents
packed into one row share it); rows without a valid token count nowhere. 1 when every sequence
is balanced in itself, at most C / K.
"""

import jax
import jax.numpy as jnp

from moe_jax.moe.losses.contract import Loss, Totals


def value(totals: Totals) -> jax.Array:
    """Returns the loss of each MoE layer, [L]."""
    # The product was taken of each row (moe/load.py): sums over rows no longer show it.
    return totals["sequence_balance"] / jnp.maximum(totals["sequences"], 1)


LOSS = Loss(
    value,
    0.0,
    "of DeepSeek-V3's sequence-wise loss",
    balances=True,
    adds_up=True,
)
