"""Token rounding: the load of an expert becomes a multiple of a tile (SonicMoE)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.ordering.contract import Ordering
from moe_jax.moe.ranks import rank_in_order
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
    """Returns the routing with each expert's count of a group rounded to a multiple of `tile`.

    Token rounding (SonicMoE, Guo et al. 2025, arXiv:2512.14080, section 5). It rounds to the
    nearest, and half a tile up. Down: the assignments with the smallest gates (of equal ones the
    later) go nowhere and count as dropped. Up: the difference is rows of padding, where SonicMoE
    would take further tokens. `sums["padding"]` [b] holds them, at the first row of each group, and
    `sums["served"]` [b] the assignments that are left: a grouped product in tiles computes both.
    Evaluation and decoding do not round, as in the paper.
    """
    if not train:
        return routing
    num_groups = num_tokens // group_tokens
    group_N = routing.token_N // group_tokens
    pair_N = (group_N, routing.expert_index_N)

    # Each assignment's rank by gate among those of its expert in its group. Nowhere is a class of
    # its own, hence E + 1.
    class_N = group_N * (num_experts + 1) + routing.expert_index_N
    # Large gates first. The sort is stable, so of equal gates the later ranks behind.
    order_N = jnp.argsort(-jax.lax.stop_gradient(routing.gate_N), stable=True)
    rank_N, count_c = rank_in_order(class_N, order_N, num_groups * (num_experts + 1))

    # How many assignments each expert has in a group, and how many it keeps.
    count_GE = count_c.reshape(num_groups, -1)[:, :num_experts]
    tile = options.tile
    # floor(count / tile + 1 / 2) * tile, in whole numbers.
    rounded_GE = (2 * count_GE + tile) // (2 * tile) * tile
    is_real_N = routing.expert_index_N < num_experts
    limit_N = rounded_GE.at[pair_N].get(mode="fill", fill_value=0)
    is_kept_N = is_real_N & (rank_N < limit_N)

    # Where a count was rounded down there is no padding.
    padding_G = jnp.maximum(rounded_GE - count_GE, 0).sum(1)
    added = _sums(routing, num_tokens, is_real_N & ~is_kept_N, is_kept_N, padding_G)
    return routing._replace(
        expert_index_N=jnp.where(is_kept_N, routing.expert_index_N, num_experts),
        gate_N=jnp.where(is_kept_N, routing.gate_N, 0),
        sums={**routing.sums, **added},
    )


def _sums(
    routing: Routing,
    num_tokens: int,
    is_dropped_N: jax.Array,
    is_kept_N: jax.Array,
    padding_G: jax.Array,
) -> dict[str, jax.Array]:
    """Returns the sums per row that rounding adds: dropped, padding and served [b]."""
    zero_b = jnp.zeros_like(routing.sums["tokens"])
    num_rows = zero_b.shape[0]
    rows_of_group = num_rows // padding_G.shape[0]
    row_N = routing.token_N // (num_tokens // num_rows)

    def count(flag_N: jax.Array) -> jax.Array:
        return zero_b.at[row_N].add(flag_N.astype(zero_b.dtype))

    return {
        "dropped": routing.sums.get("dropped", zero_b) + count(is_dropped_N),
        # Padding is of a group, but what leaves a device is a sum per row: the first row carries
        # it.
        "padding": zero_b.at[::rows_of_group].set(padding_G.astype(zero_b.dtype)),
        "served": count(is_kept_N),
    }


ORDERING = Ordering(Options, apply, sees_future=True, always=True)
