"""Token rounding: the load of an expert becomes a multiple of a tile (SonicMoE)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.layout import rank_in_order
from moe_jax.moe.ordering.contract import Ordering
from moe_jax.moe.routing.contract import Routing
from moe_jax.schema.options import NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    tile: int = option(
        16,
        "an expert's assignments of a group are rounded to a multiple of this, in training",
        NUMBER,
    )


def apply(
    routing: Routing,
    *,
    num_experts: int,
    num_tokens: int,
    group_tokens: int,
    train: bool,
    options: Options,
) -> Routing:
    """Token rounding (SonicMoE, Guo et al. 2025, arXiv:2512.14080, section 5): each expert's count
    of a group becomes a multiple of `tile`.

    To the nearest; half a tile is rounded up. Down: the assignments with the smallest gates (of
    equal ones the later) go nowhere and count as dropped. Up: the difference is rows of padding,
    where SonicMoE would take further tokens. `sums["padding"]` [b] holds them, at the first row of
    each group, and `sums["served"]` [b] the assignments that are left: a grouped product in tiles
    computes both. Evaluation and decoding do not round, as in the paper.
    """
    if not train:
        return routing
    tile, num_groups = options.tile, num_tokens // group_tokens
    group_N = routing.token_N // group_tokens
    class_N = group_N * (num_experts + 1) + routing.expert_index_N
    order_N = jnp.argsort(-jax.lax.stop_gradient(routing.gate_N), stable=True)
    rank_N = rank_in_order(class_N, order_N, num_groups * (num_experts + 1))
    real_N = routing.expert_index_N < num_experts
    count_GE = jnp.zeros_like(routing.expert_index_N, shape=(num_groups, num_experts))
    count_GE = count_GE.at[group_N, routing.expert_index_N].add(1, mode="drop")
    goal_GE = (2 * count_GE + tile) // (2 * tile) * tile
    kept_N = real_N & (
        rank_N < goal_GE.at[group_N, routing.expert_index_N].get(mode="fill", fill_value=0)
    )
    tokens_b = routing.sums["tokens"]
    num_rows = tokens_b.shape[0]
    row_N = routing.token_N // (num_tokens // num_rows)

    def per_row(flag_N):
        return jnp.zeros_like(tokens_b).at[row_N].add(flag_N.astype(tokens_b.dtype))

    padding_G = jnp.maximum(goal_GE - count_GE, 0).sum(1).astype(tokens_b.dtype)
    padding_b = jnp.zeros_like(tokens_b).at[:: num_rows // num_groups].set(padding_G)
    dropped_b = routing.sums.get("dropped", jnp.zeros_like(tokens_b)) + per_row(real_N & ~kept_N)
    return routing._replace(
        expert_index_N=jnp.where(kept_N, routing.expert_index_N, num_experts),
        gate_N=jnp.where(kept_N, routing.gate_N, 0),
        sums={
            **routing.sums,
            "dropped": dropped_b,
            "padding": padding_b,
            "served": per_row(kept_N),
        },
    )


ORDERING = Ordering(Options, apply, sees_future=True, always=True)
