"""Auxiliary losses of the router: each names its formula, its source and its normalisation, and is
a function of batch totals.

A coefficient is `model.moe.losses.NAME`; what is added is coefficient x the mean over the MoE
layers, so that a coefficient means the same at every depth. Every loss is a function of sums over
valid tokens (moe/load.py): none depends on the mesh, only `micro_batch_balance` on accumulation.
Gradients go through probs, importance, load and z; counts have none. docs/balance.md has the
factors between these definitions and those of other codebases.

Shapes: L MoE layers, C classes that are counted (E experts, and null experts where there are any).
Each function returns [L].
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moe_jax.moe.load import assigned, balanced_counts, product

Totals = Mapping[str, jax.Array]


def balance(totals: Totals) -> jax.Array:
    """Switch's load-balancing loss (Fedus et al.

    2021, arXiv:2101.03961, eq. 4-6), for k choices, of the global batch.

    C sum_e f_e P_e: f_e = assignments to e / all assignments (sum f = 1 for every k), P_e = mean
    router probability of e; both over all valid tokens of the optimizer step, all devices and
    micro-batches ("global-batch", Qiu et al. 2025, arXiv:2501.11873). 1 when balanced, at most C /
    k.
    """
    return product(balanced_counts(totals), totals["probs"], totals["tokens"])


def gshard(totals: Totals) -> jax.Array:
    """GShard's auxiliary loss (Lepikhin et al.

    2020, arXiv:2006.16668, section 2.2, algorithm 1), of the global batch.

    (1 / C) sum_e (c_e / S) m_e: c_e = tokens whose *first* choice is e, before any capacity; m_e =
    mean router probability of e; S = valid tokens. 1 / C^2 when balanced, at most 1 / C: C^2 times
    this is Switch's loss of the first choices. GShard takes it per group of tokens.
    """
    tokens_L1 = jnp.maximum(totals["tokens"], 1)[:, None]
    return ((totals["first"] / tokens_L1) * (totals["probs"] / tokens_L1)).mean(-1)


def sequence_balance(totals: Totals) -> jax.Array:
    """DeepSeek-V3's sequence-wise loss (DeepSeek-AI 2024, arXiv:2412.19437, eq.

    17-20): the mean over sequences of sum_e f_e P_e.

    f_e = C / (K T) x how many of the sequence's T tokens have e among their K largest affinities,
    the bias left out (`unbiased`; without a bias these are the assignments), P_e = their mean
    probability: Switch's product of each sequence. A sequence is a row of the batch (documents
    packed into one row share it); rows without a valid token count nowhere. 1 when every sequence
    is balanced in itself, at most C / K.
    """
    return totals["sequence_balance"] / jnp.maximum(totals["sequences"], 1)


def micro_batch_balance(totals: Totals) -> jax.Array:
    """The product of `balance` of each micro-batch (all devices) alone, averaged over the
    micro-batches that have a valid token.

    What plain accumulation optimises ("micro-batch LBL" of arXiv:2501.11873, where a micro-batch is
    a device's share besides). It equals `balance` with one micro-batch; by definition it changes
    with train.micro_batch_size.
    """
    return totals["micro_batch_balance"] / jnp.maximum(totals["micro_batches"], 1)


def importance(totals: Totals) -> jax.Array:
    """Shazeer et al.

    2017 (arXiv:1701.06538), eq. 6-7: the squared coefficient of variation of each expert's sum of
    gates.

    CV(I)^2 = var(I) / mean(I)^2 = C sum_e (I_e / sum I)^2 - 1, with the variance over all C (not C
    - 1). 0 when balanced, at most C - 1.
    """
    return variation(totals["importance"])


def load(totals: Totals) -> jax.Array:
    """Shazeer et al. 2017 (arXiv:1701.06538), eq. 10-11: as `importance`, of the smooth load.

    The load of an expert is the sum over tokens of P(x, e), the probability that e is among the
    chosen under fresh noise; only a router with noise (noisy_top_k) has it. 0 when balanced, at
    most C / k - 1, as no expert is chosen more than once by a token.
    """
    return variation(totals["load"])


def z(totals: Totals) -> jax.Array:
    """Router z-loss (Zoph et al.

    2022, ST-MoE, arXiv:2202.08906, eq. 5): mean over valid tokens of logsumexp(logits)^2.
    """
    return totals["z"] / jnp.maximum(totals["tokens"], 1)


def relu_l1(totals: Totals) -> jax.Array:
    """ReMoE's L1 loss of the ReLU router (Wang et al.

    2024, arXiv:2412.14711, section 3.3-3.4): sum_e f_e P_e.

    P_e = mean over valid tokens of ReLU(x W)_e. f_e = C / (k S) x tokens that e is active for, of S
    valid ones (1 when balanced and k are active), or 1 for the plain L1 norm: `l1_load` / S. Its
    coefficient is no constant but the router's state: `l1_weight` / S.
    """
    tokens_L1 = jnp.maximum(totals["tokens"], 1)[:, None]
    return ((totals["l1_load"] / tokens_L1) * (totals["probs"] / tokens_L1)).sum(-1)


def variation(x_LC: jax.Array) -> jax.Array:
    """Squared coefficient of variation over the classes, [L]; 0 where all are 0."""
    mean_L = x_LC.mean(-1)
    return jnp.square(x_LC - mean_L[:, None]).mean(-1) / jnp.maximum(jnp.square(mean_L), 1e-30)


LOSSES: dict[str, Callable[[Totals], jax.Array]] = {
    "balance": balance,
    "gshard": gshard,
    "sequence_balance": sequence_balance,
    "micro_batch_balance": micro_batch_balance,
    "importance": importance,
    "load": load,
    "z": z,
}
# Those that the adaptive weight multiplies.
BALANCE = ("balance", "gshard", "sequence_balance", "micro_batch_balance", "importance", "load")
# A loss whose sum not every router gives, and the routers that do.
ONLY = {"load": ("noisy_top_k",)}


def auxiliary(
    totals: Totals, coefficients: Mapping[str, float]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum that is added to the language loss, and each loss alone (unweighted, mean
    over layers).

    A coefficient of 0 adds nothing to the gradient; its loss is computed all the same, to be
    logged, unless the router has no such sum.
    """
    values = {
        n: LOSSES[n](totals) for n, c in coefficients.items() if c or n not in ONLY or n in totals
    }
    if "l1_weight" in totals:
        values["l1"] = relu_l1(totals)
    added = terms(totals, coefficients).values()
    return sum(added, jnp.zeros(())), {name: value.mean() for name, value in values.items()}


def terms(totals: Totals, coefficients: Mapping[str, float]) -> dict[str, jax.Array]:
    """What each loss adds to the language loss: with its coefficient, and with the weight that is
    router state where there is one.
    """

    def of_state(name):
        return totals[name] / jnp.maximum(totals["tokens"], 1) if name in totals else 1.0

    weight = {n: of_state("balance_weight") if n in BALANCE else 1.0 for n in coefficients}
    found = {n: c * (LOSSES[n](totals) * weight[n]).mean() for n, c in coefficients.items() if c}
    return found | (
        {"l1": (of_state("l1_weight") * relu_l1(totals)).mean()} if "l1_weight" in totals else {}
    )


def adapt(weight: jax.Array, totals: Totals, options: Mapping[str, float]) -> jax.Array:
    """The weight of one layer's balance losses after a step: x (1 + rate) if more than target_drop
    was dropped, else / (1 + rate).

    The multiplicative rule that ReMoE (Wang et al. 2024, arXiv:2412.14711) uses for its sparsity,
    driven by drops. It stays within [1 / limit, limit]. Drops and assignments are integers of the
    whole step, so every mesh takes the same branch.
    """
    dropped = totals["dropped"] / jnp.maximum(assigned(totals), 1)
    factor = jnp.where(
        dropped > options["target_drop"], 1 + options["rate"], 1 / (1 + options["rate"])
    )
    return jnp.clip(weight * factor.astype(weight.dtype), 1 / options["limit"], options["limit"])
