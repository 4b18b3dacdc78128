"""Expert load: the sums that leave the layer, and what is logged of them.

The MoE layers return sums per row, stacked to [L, B, ...]. `totals` adds up the rows; every loss
(losses.py) and every figure below is a function of totals, so none depends on the mesh, on
accumulation, on remat or on scan.

Shapes: L MoE layers, B rows of the global batch, C classes that are counted (E experts, and null
experts where there are any).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Sums = Mapping[str, jax.Array]


def totals(sums_LB: Sums) -> dict[str, jax.Array]:
    """Sums of a (micro-)batch: counts and probs [L, C], others [L]. They add up over micro-batches.

    Beside the sums over rows, what is a product before it is a sum: `sequence_balance` (of each
    row) with the number of `sequences` (rows with a valid token), and `micro_batch_balance` (of
    this micro-batch) with `micro_batches` (1).
    """
    if not sums_LB:
        return {}
    whole = {name: x.sum(1) for name, x in sums_LB.items()}

    def parts(sums):
        return (balanced_counts(sums), sums["probs"], sums["tokens"])

    chosen = sums_LB.get(
        "unbiased", balanced_counts(sums_LB)
    )  # of a router with a bias: what it would choose without

    def any_valid(sums):
        return (sums["tokens"] > 0).astype(sums["tokens"].dtype)

    return whole | {
        "sequence_balance": product(chosen, sums_LB["probs"], sums_LB["tokens"]).sum(1),
        "sequences": any_valid(sums_LB).sum(1),
        "micro_batch_balance": product(*parts(whole)),
        "micro_batches": any_valid(whole),
    }


def balanced_counts(sums: Sums) -> jax.Array:
    """Returns the counts by which balance is judged.

    They are `level` where a router gives it, because some of its classes are alike.
    """
    return sums.get("level", sums["counts"])


def assigned(totals: Sums) -> jax.Array:
    """Assignments to experts, [L] (or of one layer): all that were counted, unless a router counts
    classes that are no experts.
    """
    return totals["assigned"] if "assigned" in totals else totals["counts"].sum(-1)


def product(counts_xC: jax.Array, probs_xC: jax.Array, tokens_x: jax.Array) -> jax.Array:
    """C sum_e f_e P_e over the last dimension: f_e = counts / all counts, P_e = probs / tokens.

    1 when balanced; 0 without tokens.
    """
    f_xC = counts_xC / jnp.maximum(counts_xC.sum(-1, keepdims=True), 1)
    p_xC = probs_xC / jnp.maximum(tokens_x, 1)[..., None]
    return counts_xC.shape[-1] * (f_xC * p_xC).sum(-1)


def metrics(totals: Sums) -> dict[str, jax.Array]:
    """Figures per MoE layer ([L] each, `counts` [L, E]) from the totals of a batch.

    load_max: largest load over mean load (1 = balanced); load_entropy: entropy of the load over log
    E (1 = balanced); drop_fraction: assignments that found no place; dead_experts: experts that no
    token chose; z: mean squared log-sum-exp of the router's logits;
    router_entropy: mean entropy of the router's distribution, nats; gate: mean sum of a token's
    gates; gate_max: mean largest gate;
    max_vio: largest load over mean load - 1 (MaxVio of Wang et al. 2024, arXiv:2408.15664, section
    4.1: MaxVio_batch in training, MaxVio_global when the totals are those of a whole evaluation).
    Where there are any: balance_weight, the adaptive weight of the balance losses; l1, the
    coefficient of ReLU routing's loss; active, the mean number of experts per token of a router
    that does not fix it; padding_fraction, the share of padding in the rows of a grouped product
    whose tiles token rounding was told.
    """
    counts_LE = balanced_counts(totals)
    assigned_L = jnp.maximum(counts_LE.sum(-1), 1)
    tokens_L = jnp.maximum(totals["tokens"], 1)
    share_LE = counts_LE / assigned_L[:, None]
    num_experts = counts_LE.shape[1]
    entropy_L = -(share_LE * jnp.log(jnp.maximum(share_LE, 1e-30))).sum(-1)
    figures = {
        "counts": totals["counts"],
        "load_max": share_LE.max(-1) * num_experts,
        "max_vio": share_LE.max(-1) * num_experts - 1,
        "load_entropy": entropy_L / jnp.log(jnp.maximum(num_experts, 2)),
        "drop_fraction": totals["dropped"] / jnp.maximum(assigned(totals), 1),
        "dead_experts": (counts_LE == 0).sum(-1).astype(counts_LE.dtype),
        "z": totals["z"] / tokens_L,
        "router_entropy": totals["entropy"] / tokens_L,
        "gate": totals["gate"] / tokens_L,
        "gate_max": totals["gate_max"] / tokens_L,
    }
    if "balance_weight" in totals:
        figures["balance_weight"] = totals["balance_weight"] / tokens_L
    if "l1_weight" in totals:
        figures["l1"] = totals["l1_weight"] / tokens_L
    if "assigned" in totals:
        figures["active"] = totals["assigned"] / tokens_L
    if "padding" in totals:
        figures["padding_fraction"] = totals["padding"] / jnp.maximum(
            totals["padding"] + totals["served"], 1
        )
    return figures
