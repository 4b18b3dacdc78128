"""Capacity dispatch: each expert takes at most C assignments of each group, and tokens travel by
all-to-all over the expert axis.

C = ceil(factor * assignments of a group / E), those that the router intends (k per token, for
most), per *group* (model.moe.group_rows sequences), never per device, so the same assignments drop
on every mesh (Lepikhin et al. 2020, GShard, arXiv:2006.16668, section 2.2, where the group is a
device's share). Earlier entries of the routing win: token-major order never lets a later token take
an earlier one's place, so a causal model stays causal. Or C is a number of places, which is a
property of the model: Switch Transformers (Fedus et al. 2021, arXiv:2101.03961) drop at evaluation
as well, and transformers has so many places in each row (`expert_capacity`).

Buffers per device: E * (T / group) * C rows sent, as many received and computed. Where nothing is
sent, on an expert axis of one device, only those that are filled are computed.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch.contract import Dispatcher, Experts
from moe_jax.moe.dispatch.layout import Shape, assignment_of_row
from moe_jax.moe.dispatch.places import through_experts
from moe_jax.moe.experts.gathers import sum_rows, take_rows
from moe_jax.moe.ranks import rank_in_order
from moe_jax.moe.routing.contract import Routing
from moe_jax.schema.options import COUNT, POSITIVE, option


@dataclasses.dataclass(frozen=True)
class Options:
    factor: float = option(
        1.25,
        "An expert takes ceil(factor * k * tokens / num_experts) of each group; for null experts k "
        "is the intended number of real ones.",
        POSITIVE,
    )
    places: int = option(
        0, "of an expert in each group, whatever the factor is; 0 = as many as it says", COUNT
    )


def expert_capacity(shape: Shape, options: Options) -> int:
    """Returns C: the places of one expert in one group."""
    assignments_of_group = shape.own_intended * shape.group_tokens / shape.num_tokens
    # 1e-9, so that a product which is whole but for rounding is not rounded up.
    by_factor = math.ceil(options.factor * assignments_of_group / shape.num_experts - 1e-9)
    num_places = options.places or by_factor
    # A token uses an expert once, so no more places than tokens can ever be used.
    return max(1, min(num_places, shape.group_tokens))


def rows(shape: Shape, options: Options) -> int:
    """Returns the rows received and computed per device.

    These are all places of the local experts, filled or not.
    """
    num_groups = shape.num_tokens // shape.group_tokens
    return shape.num_experts * num_groups * expert_capacity(shape, options)


def received(shape: Shape, options: Options) -> int:
    """Returns the rows that a device receives from others: all but its own part."""
    return rows(shape, options) * (shape.expert_axis - 1) // shape.expert_axis


def apply(
    x_TD: jax.Array,
    routing: Routing,
    experts: Experts,
    *,
    shape: Shape,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Returns (y_TD, dropped_N) as contract.py says. Assignments past C are dropped and flagged."""
    with jax.named_scope("dispatch"):
        is_real_N = routing.expert_index_N < shape.num_experts
        # 1. The row of each assignment in the buffer of R = E G C rows. R itself means nowhere.
        row_N, is_kept_N, filled_E = _rows_of_assignments(routing, is_real_N, shape, options)
        # 2. The same from the rows' side. A void row gets the token T, which is out of bounds, and
        # the gate 0: it is zero.
        assignment_R = assignment_of_row(row_N, rows(shape, options))
        src_R = routing.token_N.at[assignment_R].get(mode="fill", fill_value=shape.num_tokens)
        # With K choices for every token the list is [T, K]: then both directions are gathers
        # (moe/experts/gathers.py).
        dest_TK = row_N.reshape(-1, shape.per_token) if shape.per_token else None
        # 3. There and back.
        x_RD = take_rows(x_TD, src_R, dest_TK)
        gate_R = routing.gate_N.at[assignment_R].get(mode="fill", fill_value=0)
    y_RD = through_experts(x_RD, gate_R, experts, shape, filled_E)
    with jax.named_scope("combine"):
        y_TD = sum_rows(y_RD, dest_TK, src_R, shape.num_tokens)
    # What was sent nowhere has no place either, but it is not dropped.
    return y_TD, is_real_N & ~is_kept_N


def _rows_of_assignments(
    routing: Routing, is_real_N: jax.Array, shape: Shape, options: Options
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (the row of each assignment in the buffer, whether it has a place, how many rows of
    each expert are filled).
    """
    num_groups = shape.num_tokens // shape.group_tokens
    num_places = expert_capacity(shape, options)
    group_N = routing.token_N // shape.group_tokens
    # The rank among the assignments of an expert in a group. Nowhere is a class of its own, hence
    # E + 1.
    num_classes = num_groups * (shape.num_experts + 1)
    class_N = group_N * (shape.num_experts + 1) + routing.expert_index_N
    rank_N, count_c = rank_in_order(class_N, routing.order_N, num_classes)
    is_kept_N = is_real_N & (rank_N < num_places)
    # All rows of an expert lie together, the G C of its groups, and those that are filled first: on
    # one device the others are not computed.
    kept_GE = jnp.minimum(count_c, num_places).reshape(num_groups, -1)
    before_GE = jnp.cumsum(kept_GE, axis=0) - kept_GE
    first_N = routing.expert_index_N * (num_groups * num_places) + before_GE.reshape(-1)[class_N]
    # One past the last row is out of bounds: it is neither read nor written.
    row_N = jnp.where(is_kept_N, first_N + rank_N, rows(shape, options))
    filled_E = kept_GE.sum(axis=0, dtype=kept_GE.dtype)[: shape.num_experts]
    return row_N, is_kept_N, filled_E


def of_the_model(options: Options) -> bool:
    """Returns whether so many places are a property of the model."""
    return options.places > 0


def advice(options: Options, at: str, expert_axis: int) -> Iterator[str]:
    """Yields that a factor does nothing beside a number of places."""
    del expert_axis
    if options.places and options.factor != Options().factor:
        yield (
            f"{at}.factor = {options.factor} does nothing, because {at}.places = {options.places} "
            "says how many there are"
        )


def roomy(options: Options, num_experts: int) -> Options:
    """Returns the options with places for all tokens at every expert."""
    return dataclasses.replace(options, factor=float(num_experts), places=0)


DISPATCHER = Dispatcher(
    Options,
    apply,
    rows,
    received,
    drops=True,
    exchanges=True,
    overflow="the rest drops",
    of_the_model=of_the_model,
    roomy=roomy,
    advice=advice,
)
