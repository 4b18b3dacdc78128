"""Expert load: the sums that leave the layer, and what is logged of them.

The MoE layers return sums per row, stacked to [L, B, ...]. `totals` adds up the rows; every loss
(losses/) and every figure below is a function of totals, so none depends on the mesh, on
accumulation, on remat or on scan.

Shapes: L MoE layers, B rows of the global batch, C classes that are counted (E experts, and null
experts where there are any).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Sums = Mapping[str, jax.Array]


def totals(sums_LB: Sums) -> dict[str, jax.Array]:
    """Returns the sums of a (micro-)batch: counts and probs [L, C], others [L].

    They add up over micro-batches. Beside the sums over rows, they have what is a product before
    it is a sum: `sequence_balance` (of each row) with the number of `sequences` (rows with a valid
    token), and `micro_batch_balance` (of this micro-batch) with `micro_batches` (1).
    """
    if not sums_LB:
        return {}
    whole = {name: x.sum(1) for name, x in sums_LB.items()}
    # Of a router with a bias: what it would choose without (DeepSeek-V3, eq. 18).
    chosen_LBC = sums_LB.get("unbiased", balanced_counts(sums_LB))
    # f_e P_e of every row, before the sum over rows.
    sequence_balance_LB = product(chosen_LBC, sums_LB["probs"], sums_LB["tokens"])
    return whole | {
        "sequence_balance": sequence_balance_LB.sum(1),
        "sequences": _has_tokens(sums_LB).sum(1),
        "micro_batch_balance": product(balanced_counts(whole), whole["probs"], whole["tokens"]),
        # 0 for a micro-batch of padding alone: it has no balance to average.
        "micro_batches": _has_tokens(whole),
    }


def _has_tokens(sums: Sums) -> jax.Array:
    """Returns 1 where there is a valid token, else 0, in the dtype of the sums."""
    tokens = sums["tokens"]
    return (tokens > 0).astype(tokens.dtype)


def balanced_counts(sums: Sums) -> jax.Array:
    """Returns the counts by which balance is judged.

    They are `level` where a router gives it, because some of its classes are alike.
    """
    return sums.get("level", sums["counts"])


def assigned(totals: Sums) -> jax.Array:
    """Returns the assignments to experts, [L] (or of one layer).

    These are all that were counted, unless a router counts classes that are no experts.
    """
    return totals["assigned"] if "assigned" in totals else totals["counts"].sum(-1)


def product(counts_xC: jax.Array, probs_xC: jax.Array, tokens_x: jax.Array) -> jax.Array:
    """Returns C sum_e f_e P_e over the last dimension: 1 when balanced, 0 without tokens.

    f_e = counts / all counts, P_e = probs / tokens.
    """
    num_classes = counts_xC.shape[-1]
    f_xC = counts_xC / jnp.maximum(counts_xC.sum(-1, keepdims=True), 1)
    p_xC = probs_xC / jnp.maximum(tokens_x, 1)[..., None]
    return num_classes * (f_xC * p_xC).sum(-1)


def metrics(totals: Sums) -> dict[str, jax.Array]:
    """Returns figures per MoE layer ([L] each, `counts` [L, C]) from the totals of a batch.

    load_max: largest load over mean load (1 = balanced).
    max_vio: load_max - 1 (MaxVio of Wang et al. 2024, arXiv:2408.15664, section 4.1: MaxVio_batch
        in training, MaxVio_global when the totals are those of a whole evaluation).
    load_entropy: entropy of the load over log C (1 = balanced).
    drop_fraction: assignments that found no place.
    dead_experts: experts that no token chose.
    z: mean squared log-sum-exp of the router's logits.
    router_entropy: mean entropy of the router's distribution, nats.
    gate, gate_max: mean sum, and mean maximum, of a token's gates.

    Where there are any: balance_weight, the adaptive weight of the balance losses; l1, the
    coefficient of ReLU routing's loss; active, the mean number of experts per token of a router
    that does not fix it; padding_fraction, the share of padding in the rows of a grouped product
    whose tiles token rounding was told.
    """
    counts_LC = balanced_counts(totals)
    num_classes = counts_LC.shape[1]
    tokens_L = jnp.maximum(totals["tokens"], 1)
    load_LC = counts_LC / jnp.maximum(counts_LC.sum(-1), 1)[:, None]
    load_max_L = load_LC.max(-1) * num_classes
    # A load of 0 adds 0 log 0 = 0.
    entropy_L = -(load_LC * jnp.log(jnp.maximum(load_LC, 1e-30))).sum(-1)
    # Of one class the entropy is 0 whatever it is divided by.
    most_entropy = jnp.log(jnp.asarray(max(num_classes, 2), entropy_L.dtype))
    figures = {
        "counts": totals["counts"],
        "load_max": load_max_L,
        "max_vio": load_max_L - 1,
        "load_entropy": entropy_L / most_entropy,
        "drop_fraction": totals["dropped"] / jnp.maximum(assigned(totals), 1),
        "dead_experts": (counts_LC == 0).sum(-1).astype(counts_LC.dtype),
        "z": totals["z"] / tokens_L,
        "router_entropy": totals["entropy"] / tokens_L,
        "gate": totals["gate"] / tokens_L,
        "gate_max": totals["gate_max"] / tokens_L,
    }
    # Sums that only some routers have; each figure is a mean over tokens.
    optional = {"balance_weight": "balance_weight", "l1": "l1_weight", "active": "assigned"}
    for figure, name in optional.items():
        if name in totals:
            figures[figure] = totals[name] / tokens_L
    if "padding" in totals:
        num_rows_L = totals["padding"] + totals["served"]
        figures["padding_fraction"] = totals["padding"] / jnp.maximum(num_rows_L, 1)
    return figures
