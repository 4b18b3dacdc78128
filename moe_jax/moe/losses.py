"""Auxiliary losses of the router: each names its formula, its source and its normalisation, and is a function of batch totals.

A coefficient is `model.moe.losses.NAME`; the loss that is added is coefficient x the mean over the MoE layers, so that a coefficient
means the same at every depth. f_e and P_e are taken over the valid tokens of the whole batch, all devices and micro-batches.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Totals = Mapping[str, jax.Array]


def balance(totals: Totals) -> jax.Array:
    """Switch load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6), extended to k choices.

    E sum_e f_e P_e per layer [L]: f_e = assignments to e / all assignments (so sum f = 1 for every k), P_e = mean router probability of
    e. 1 when balanced, E when all tokens go to one expert. transformers' `load_balancing_loss_func` is k times this.
    """
    counts_LE, probs_LE = totals["counts"], totals["probs"]
    f_LE = counts_LE / jnp.maximum(counts_LE.sum(-1, keepdims=True), 1)
    p_LE = probs_LE / jnp.maximum(totals["tokens"], 1)[:, None]
    return counts_LE.shape[1] * (f_LE * p_LE).sum(-1)


def z(totals: Totals) -> jax.Array:
    """Router z-loss (Zoph et al. 2022, ST-MoE, arXiv:2202.08906, eq. 5): mean over tokens of logsumexp(logits)^2, per layer [L]."""
    return totals["z"] / jnp.maximum(totals["tokens"], 1)


LOSSES: dict[str, Callable[[Totals], jax.Array]] = {"balance": balance, "z": z}
BALANCE = ("balance",)  # those that the adaptive weight multiplies


def auxiliary(totals: Totals, coefficients: Mapping[str, float]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum that is added to the language loss, and each loss alone (unweighted, mean over layers)."""
    values = {name: LOSSES[name](totals) for name in coefficients}
    weight_L = totals["balance_weight"] / totals["tokens"] if "balance_weight" in totals else 1.0
    weighted = [coefficients[n] * (v * weight_L if n in BALANCE else v).mean() for n, v in values.items()]
    return sum(weighted, jnp.zeros(())), {name: value.mean() for name, value in values.items()}


def adapt(weight: jax.Array, totals: Totals, options: Mapping[str, float]) -> jax.Array:
    """The weight of a layer's balance losses after a step: larger by a factor 1 + rate if too much was dropped, else smaller by it."""
    dropped = totals["dropped"] / jnp.maximum(totals["counts"].sum(), 1)
    factor = jnp.where(dropped > options["target_drop"], 1 + options["rate"], 1 / (1 + options["rate"]))
    return jnp.clip(weight * factor.astype(weight.dtype), 1 / options["limit"], options["limit"])
