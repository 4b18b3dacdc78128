"""Orderings: which assignment wins when capacity is short.

Any ordering goes with any token-choice router.

An ordering is `apply(routing, *, num_experts, num_tokens, group_tokens, train, options) ->
Routing`, on the assignments of one device. It never moves tokens between groups. It may set
`order_N` (the entries in order of priority) or send assignments nowhere, which it counts per row in
`sums["dropped"]`. `sees_future`: may a later token change an earlier output, given a dispatcher
that drops; `always`: without one, too.

Shapes: N assignments, T tokens of this device, E experts, G groups, b rows.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.layout import rank_in, rank_in_order
from moe_jax.moe.routing.contract import Routing


class Ordering(NamedTuple):
    apply: Callable[..., Routing]
    sees_future: bool  # where a dispatcher drops
    always: bool  # sees the future with every dispatcher


def token_major(routing: Routing, **sizes) -> Routing:
    """As the router lists them: token by token, a token's choices in order of falling gate.

    Causal: later tokens never win over earlier.
    """
    del sizes
    return routing


def k_major(routing: Routing, *, num_tokens: int, **sizes) -> Routing:
    """All first choices of a group before all second ones (GShard, Lepikhin et al.

    2020, arXiv:2006.16668, algorithm 1).
    """
    del sizes
    # One order for all groups: only the order inside a group matters to a dispatcher.
    return routing._replace(
        order_N=jnp.argsort(_choice(routing, num_tokens), stable=True).astype(jnp.int32)
    )


def batch_priority(routing: Routing, *, num_tokens: int, **sizes) -> Routing:
    """Batch prioritized routing (V-MoE, Riquelme et al.

    2021, arXiv:2106.05974, section 4.1): tokens of a group by their largest gate.

    All first choices come before all second ones, as in the paper; tokens with equal gates by their
    place. The paper's gates are probabilities over all experts: for its order set
    `renormalize=False` where a router has that. Gates that sum to 1 rank a token by the share of
    its first choice among its k, and by nothing with k = 1.
    """
    del sizes
    gate_N = jax.lax.stop_gradient(routing.gate_N)
    best_T = (
        jnp.full_like(gate_N, -jnp.inf, shape=(num_tokens,))
        .at[routing.token_N]
        .max(gate_N, mode="drop")
    )
    place_T = jnp.argsort(jnp.argsort(-best_T, stable=True))
    order_N = jnp.lexsort((place_T[routing.token_N], _choice(routing, num_tokens)))
    return routing._replace(order_N=order_N.astype(jnp.int32))


def rounding(
    routing: Routing,
    *,
    num_experts: int,
    num_tokens: int,
    group_tokens: int,
    train: bool,
    options: Mapping[str, Any],
) -> Routing:
    """Token rounding (SonicMoE, Guo et al.

    2025, arXiv:2512.14080, section 5): each expert's count of a group becomes a multiple of `tile`.

    To the nearest; half a tile is rounded up. Down: the assignments with the smallest gates (of
    equal ones the later) go nowhere and count as dropped. Up: the difference is rows of padding,
    where SonicMoE would take further tokens. `sums["padding"]` [b] holds them, at the first row of
    each group, and `sums["served"]` [b] the assignments that are left: a grouped product in tiles
    computes both. Evaluation and decoding do not round, as in the paper.
    """
    if not train:
        return routing
    tile, num_groups = options["tile"], num_tokens // group_tokens
    group_N = routing.token_N // group_tokens
    class_N = group_N * (num_experts + 1) + routing.expert_N
    order_N = jnp.argsort(-jax.lax.stop_gradient(routing.gate_N), stable=True)
    rank_N = rank_in_order(class_N, order_N, num_groups * (num_experts + 1))
    real_N = routing.expert_N < num_experts
    count_GE = jnp.zeros_like(routing.expert_N, shape=(num_groups, num_experts))
    count_GE = count_GE.at[group_N, routing.expert_N].add(1, mode="drop")
    goal_GE = (2 * count_GE + tile) // (2 * tile) * tile
    kept_N = real_N & (
        rank_N < goal_GE.at[group_N, routing.expert_N].get(mode="fill", fill_value=0)
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
        expert_N=jnp.where(kept_N, routing.expert_N, num_experts),
        gate_N=jnp.where(kept_N, routing.gate_N, 0),
        sums={
            **routing.sums,
            "dropped": dropped_b,
            "padding": padding_b,
            "served": per_row(kept_N),
        },
    )


def _choice(routing: Routing, num_tokens: int) -> jax.Array:
    """Which of its token's entries each entry is, counting from 0, [N]."""
    if routing.per_token:
        return jnp.arange(routing.token_N.shape[0], dtype=jnp.int32) % routing.per_token
    return rank_in(routing.token_N, num_tokens)[0]


ORDERINGS: dict[str, Ordering] = {
    "token_major": Ordering(token_major, sees_future=False, always=False),
    "k_major": Ordering(k_major, sees_future=True, always=False),
    "batch_priority": Ordering(batch_priority, sees_future=True, always=False),
    "rounding": Ordering(rounding, sees_future=True, always=True),
}
