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
    """Returns the weighted sum that is added to the task's loss, and each loss alone.

    Each alone is unweighted, the mean over layers. A coefficient of 0 adds nothing to the
    gradient; its loss is computed all the same, to be logged, unless the router has no such sum.
    """
    values = {
        name: LOSSES[name].value(totals)
        for name, coefficient in coefficients.items()
        if coefficient or _can_be_logged(LOSSES[name], totals)
    }
    # ReLU routing brings this loss along. It is not in LOSSES, as its coefficient is router state.
    if "l1_weight" in totals:
        values["l1"] = l1.value(totals)
    means = {name: value_L.mean() for name, value_L in values.items()}
    # A model without MoE layers has no totals.
    zero = jnp.zeros((), totals["tokens"].dtype if totals else None)
    return sum(terms(totals, coefficients).values(), zero), means


def _can_be_logged(loss: Loss, totals: Totals) -> bool:
    return not loss.needs or loss.needs in totals


def terms(totals: Totals, coefficients: Mapping[str, float]) -> dict[str, jax.Array]:
    """Returns what each loss adds to the task's loss.

    It is multiplied with its coefficient, and with the weight that is router state where there is
    one.
    """
    added = {}
    for name, coefficient in coefficients.items():
        if not coefficient:
            continue
        loss = LOSSES[name]
        # The adaptive weight (`adapt`) multiplies only what asks for balance.
        weight_L = _weight_of_state(totals, "balance_weight") if loss.balances else 1.0
        added[name] = coefficient * (loss.value(totals) * weight_L).mean()
    if "l1_weight" in totals:
        added["l1"] = (_weight_of_state(totals, "l1_weight") * l1.value(totals)).mean()
    return added


def _weight_of_state(totals: Totals, name: str) -> jax.Array | float:
    """Returns a weight that is router state, [L]; 1 where the router has none."""
    if name not in totals:
        return 1.0
    # It leaves the layer as every other number does, as a sum over tokens.
    return totals[name] / jnp.maximum(totals["tokens"], 1)


def adapt(weight: jax.Array, totals: Totals, options: AdaptiveConfig) -> jax.Array:
    """Returns the weight of one layer's balance losses after a step.

    It grows by the factor 1 + rate if more than target_drop was dropped, and else shrinks by it;
    it stays within [1 / limit, limit]. The multiplicative rule that ReMoE (Wang et al. 2024,
    arXiv:2412.14711) uses for its sparsity, driven by drops.
    """
    # Drops and assignments are integers of the whole step, so every mesh takes the same branch.
    drop_fraction = totals["dropped"] / jnp.maximum(assigned(totals), 1)
    too_many = drop_fraction > options.target_drop
    factor = jnp.where(too_many, 1 + options.rate, 1 / (1 + options.rate))
    return jnp.clip(weight * factor.astype(weight.dtype), 1 / options.limit, options.limit)
