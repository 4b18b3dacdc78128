"""Expert load: the sums that leave the layer, and what is logged of them.

The MoE layers return sums per row, stacked to [L, B, ...] (L MoE layers, B rows of the global batch). `totals` adds up the rows; every
loss (losses.py) and every figure below is a function of totals, so none depends on the mesh, on accumulation, on remat or on scan.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Sums = Mapping[str, jax.Array]


def totals(sums_LB: Sums) -> dict[str, jax.Array]:
    """Sums over the rows of a (micro-)batch: counts and probs [L, E], others [L]; what is no sum of them (sequence-wise losses) beside."""
    return {name: x.sum(1) for name, x in sums_LB.items()}


def metrics(totals: Sums) -> dict[str, jax.Array]:
    """Figures per MoE layer ([L] each, `counts` [L, E]) from the totals of a batch.

    load_max: largest load over mean load (1 = balanced); load_entropy: entropy of the load over log E (1 = balanced); drop_fraction:
    assignments that found no place; dead_experts: experts that no token chose; z: mean squared log-sum-exp of the router's logits;
    router_entropy: mean entropy of the router's distribution, nats; gate: mean sum of a token's gates; gate_max: mean largest gate;
    max_vio: largest load over mean load - 1 (MaxVio of Wang et al. 2024, arXiv:2408.15664, section 4.1; of a batch in training, global
    when the totals are those of a whole evaluation).
    """
    counts_LE = totals["counts"]
    assigned_L = jnp.maximum(counts_LE.sum(-1), 1)
    tokens_L = jnp.maximum(totals["tokens"], 1)
    share_LE = counts_LE / assigned_L[:, None]
    num_experts = counts_LE.shape[1]
    entropy_L = -(share_LE * jnp.log(jnp.maximum(share_LE, 1e-30))).sum(-1)
    return {
        "counts": counts_LE,
        "load_max": share_LE.max(-1) * num_experts,
        "max_vio": share_LE.max(-1) * num_experts - 1,
        "load_entropy": entropy_L / jnp.log(jnp.maximum(num_experts, 2)),
        "drop_fraction": totals["dropped"] / assigned_L,
        "dead_experts": (counts_LE == 0).sum(-1).astype(counts_LE.dtype),
        "z": totals["z"] / tokens_L,
        "router_entropy": totals["entropy"] / tokens_L,
        "gate": totals["gate"] / tokens_L,
        "gate_max": totals["gate_max"] / tokens_L,
    }
