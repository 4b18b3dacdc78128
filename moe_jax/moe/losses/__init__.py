"""Auxiliary losses of the router: each names its formula, its source and its normalisation, and is
a function of batch totals.

A new one is one file here and one line in LOSSES; the contract is in contract.py. Gradients go
through probs, importance, load and z; counts have none. docs/balance.md has the factors between
these definitions and those of other codebases.

Shapes: L MoE layers.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe.load import assigned
from moe_jax.moe.losses import (
    balance,
    gshard,
    importance,
    l1,
    load,
    micro_batch_balance,
    sequence_balance,
    z,
)
from moe_jax.moe.losses.contract import Loss, Totals
from moe_jax.schema.config import AdaptiveConfig

LOSSES: dict[str, Loss] = {
    "balance": balance.LOSS,
    "gshard": gshard.LOSS,
    "sequence_balance": sequence_balance.LOSS,
    "micro_batch_balance": micro_batch_balance.LOSS,
    "importance": importance.LOSS,
    "load": load.LOSS,
    "z": z.LOSS,
}
# Those that ask for balance.
BALANCE = tuple(name for name, loss in LOSSES.items() if loss.balances)


def auxiliary(
    totals: Totals, coefficients: Mapping[str, float]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum that is added to the language loss, and each loss alone (unweighted, mean
    over layers).

    A coefficient of 0 adds nothing to the gradient; its loss is computed all the same, to be
    logged, unless the router has no such sum.
    """
    values = {
        n: LOSSES[n].value(totals)
        for n, c in coefficients.items()
        if c or not LOSSES[n].needs or LOSSES[n].needs in totals
    }
    if "l1_weight" in totals:
        values["l1"] = l1.value(totals)
    added = terms(totals, coefficients).values()
    return sum(added, jnp.zeros(())), {name: value.mean() for name, value in values.items()}


def terms(totals: Totals, coefficients: Mapping[str, float]) -> dict[str, jax.Array]:
    """Returns what each loss adds to the language loss: with its coefficient, and with the weight
    that is router state where there is one.
    """

    def of_state(name):
        return totals[name] / jnp.maximum(totals["tokens"], 1) if name in totals else 1.0

    weight = {n: of_state("balance_weight") if LOSSES[n].balances else 1.0 for n in coefficients}
    found = {
        n: c * (LOSSES[n].value(totals) * weight[n]).mean() for n, c in coefficients.items() if c
    }
    return found | (
        {"l1": (of_state("l1_weight") * l1.value(totals)).mean()} if "l1_weight" in totals else {}
    )


def adapt(weight: jax.Array, totals: Totals, options: AdaptiveConfig) -> jax.Array:
    """The weight of one layer's balance losses after a step: x (1 + rate) if more than target_drop
    was dropped, else / (1 + rate).

    The multiplicative rule that ReMoE (Wang et al. 2024, arXiv:2412.14711) uses for its sparsity,
    driven by drops. It stays within [1 / limit, limit]. Drops and assignments are integers of the
    whole step, so every mesh takes the same branch.
    """
    dropped = totals["dropped"] / jnp.maximum(assigned(totals), 1)
    factor = jnp.where(dropped > options.target_drop, 1 + options.rate, 1 / (1 + options.rate))
    return jnp.clip(weight * factor.astype(weight.dtype), 1 / options.limit, options.limit)
