"""Dropless dispatch: every assignment is served, whatever the imbalance.

The tokens of the expert axis are gathered, each device works on the rows of its own experts, and a
reduce-scatter brings the sums home: T rows sent, n T received (n = length of the expert axis),
fewer bytes than a dense all-to-all emulation for every k > 1.

`buffer` chooses the memory. 0: one round with room for the worst case, n T min(k, e) rows. f >= 1:
rounds of f times the balanced load; rounds that nobody needs are skipped, so time grows with the
imbalance and memory does not (each round is recomputed in the backward pass).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe import kept
from moe_jax.moe.dispatch.contract import Dispatcher, Experts
from moe_jax.moe.dispatch.exchange import SAVED, all_gather, reduce_scatter
from moe_jax.moe.dispatch.layout import Shape, assignment_of_row, rank_in, round_up
from moe_jax.moe.experts import direct
from moe_jax.moe.experts.blocks import block_sizes
from moe_jax.moe.experts.gathers import sum_rows, take_rows
from moe_jax.moe.routing.contract import Routing
from moe_jax.schema.options import NONE_OR_FROM_ONE, option


@dataclasses.dataclass(frozen=True)
class Options:
    buffer: float = option(
        0.0,
        "rows held at once, as a factor of the balanced load; 0 = the worst case in one round",
        NONE_OR_FROM_ONE,
    )
    direct: bool = option(
        False,
        "so few tokens that sorting takes longer than computing are not sorted "
        "(moe/experts/direct.py); decoding sets it",
    )


def _block(shape: Shape) -> tuple[int, int]:
    """Returns the blocks of the grouped product for the mean load of an expert."""
    # n N assignments of the whole expert axis, over E experts.
    all_experts = shape.num_experts * shape.seq_axis
    return block_sizes(shape.num_assignments * shape.expert_axis / all_experts)


def worst(shape: Shape) -> int:
    """Returns the rows that one device may have to serve."""
    e = shape.local_experts
    _, small_block = _block(shape)
    local_assignments = shape.num_assignments
    if shape.per_token:
        # A token's experts are distinct, so at most min(k, e) of them are local.
        local_assignments = min(shape.per_token, e) * shape.num_tokens
    # The room of every expert is rounded up to whole blocks.
    num_rows = shape.expert_axis * local_assignments + e * (small_block - 1)
    return round_up(num_rows, small_block)


def rows(shape: Shape, options: Options) -> int:
    """Returns the rows held at once per device: the worst case, or the buffer."""
    if not options.buffer:
        return worst(shape)
    _, small_block = _block(shape)
    # With a balanced load a device serves as many assignments as its own tokens make.
    num_rows = math.ceil(options.buffer * shape.num_intended / shape.seq_axis)
    return min(worst(shape), round_up(num_rows, small_block))


def _are_few(shape: Shape) -> bool:
    """Returns whether the tokens of the expert axis are computed faster without being sorted."""
    n = shape.expert_axis
    return direct.is_faster(n * shape.num_tokens, n * shape.num_assignments, shape.local_experts)


def received(shape: Shape, options: Options) -> int:
    """Returns the tokens that a device receives from others: all of the axis but its own."""
    del options
    return (shape.expert_axis - 1) * shape.num_tokens


class _Assignments(NamedTuple):
    """Holds the M = n N assignments of the whole expert axis, and where the local ones lie."""

    token_M: jax.Array
    # Counted on this device; e = the expert is another device's, or nowhere.
    local_index_M: jax.Array
    gate_M: jax.Array
    # The row of each local assignment in the layout of all of this device's rows. For an
    # assignment of another device's expert it is the end of the layout.
    row_M: jax.Array
    is_local_M: jax.Array
    # The first row of each local expert, and the number of its assignments.
    start_e: jax.Array
    size_e: jax.Array
    # The rows up to the end of the last local expert.
    num_needed: jax.Array


def apply(
    x_TD: jax.Array,
    routing: Routing,
    experts: Experts,
    *,
    shape: Shape,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """Returns (y_TD, dropped_N) as contract.py says. Nothing drops."""
    block = _block(shape)
    # 1. All n T tokens of the expert axis and their M = n N assignments come to every device.
    with jax.named_scope("dispatch"):
        x_nTD, gathered = _gather(x_TD, routing, shape)
        # Named here, so that tokens do not travel again; the rows below are made of them.
        x_nTD = checkpoint_name(x_nTD, SAVED)

    def serve(x_nTD: jax.Array, gate_M: jax.Array, offset: Any, num_rows: int) -> jax.Array:
        """Returns the weighted results of the rows [offset, offset + num_rows) of the layout,
        summed per token.
        """
        with jax.named_scope("dispatch"):
            row_M, first_e, size_e = _window(gathered, offset, num_rows)
            assignment_R = assignment_of_row(row_M, num_rows)
            num_tokens = x_nTD.shape[0]
            # A void row gets the token n T, which is out of bounds: `take_rows` makes it zero.
            src_R = gathered.token_M.at[assignment_R].get(mode="fill", fill_value=num_tokens)
            # The gathered list is still in the order of tokens, K entries each: [n T, K].
            dest_TK = row_M.reshape(-1, shape.per_token) if shape.per_token else None
            x_RD = take_rows(x_nTD, src_R, dest_TK)
            gate_R = gate_M.at[assignment_R].get(mode="fill", fill_value=0)
        y_RD = experts.grouped(x_RD, gate_R, first_e, size_e, block)
        with jax.named_scope("combine"):
            return sum_rows(y_RD, dest_TK, src_R, num_tokens)

    # 2. The rows of the local experts are served, in one round where the buffer holds them all.
    num_rows = rows(shape, options)
    num_rounds = -(-worst(shape) // num_rows)
    if options.direct and experts.direct and _are_few(shape):
        y_nTD = experts.direct(x_nTD, gathered.token_M, gathered.local_index_M, gathered.gate_M)
    elif num_rounds == 1:
        y_nTD = serve(x_nTD, gathered.gate_M, 0, num_rows)
    else:
        y_nTD = _in_rounds(serve, x_nTD, gathered, num_rows, num_rounds)
    # 3. Each device has the sums over its own experts, for all n T tokens: they are added up over
    # the axis, and each device keeps its T tokens.
    with jax.named_scope("combine"):
        y_TD = reduce_scatter(y_nTD, "expert", 0)
    return y_TD, jnp.zeros_like(routing.expert_index_N, dtype=bool)


def _gather(x_TD: jax.Array, routing: Routing, shape: Shape) -> tuple[jax.Array, _Assignments]:
    """Returns the tokens of the whole expert axis, in the order of its devices, and their
    assignments.
    """

    def gather(z: jax.Array) -> jax.Array:
        return all_gather(z, "expert", 0)

    device = jax.lax.axis_index("expert")
    # Numbered over the whole axis, as the gathered tokens lie.
    token_N = routing.token_N + device.astype(jnp.int32) * shape.num_tokens
    x_nTD, token_M = gather(x_TD), gather(token_N)
    expert_index_M, gate_M = gather(routing.expert_index_N), gather(routing.gate_N)

    # Local experts are numbered from 0; those of other devices, and nowhere, are number e.
    e = shape.local_experts
    local_index_M = expert_index_M - device * e
    local_index_M = jnp.where((local_index_M >= 0) & (local_index_M < e), local_index_M, e)
    is_local_M = local_index_M < e
    rank_M, count, _ = rank_in(local_index_M, e + 1)
    # The last class, e, is that of all others.
    size_e = count[:e]

    # Each expert starts at a multiple of the small block.
    _, small_block = _block(shape)
    room_e = -(-size_e // small_block) * small_block
    # The exclusive sum: where the room of each expert begins.
    start_e = jnp.cumsum(room_e) - room_e
    start_M = start_e.at[local_index_M].get(mode="fill", fill_value=0)
    row_M = jnp.where(is_local_M, start_M + rank_M, worst(shape))
    return x_nTD, _Assignments(
        token_M,
        local_index_M,
        gate_M,
        row_M,
        is_local_M,
        start_e,
        size_e,
        num_needed=room_e.sum(dtype=room_e.dtype),
    )


def _window(
    gathered: _Assignments, offset: Any, num_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (row_M, first_e, size_e) of the rows [offset, offset + num_rows), counted from 0.

    The row of an assignment that lies outside is num_rows.
    """
    row_M, start_e = gathered.row_M, gathered.start_e
    # The last window may reach past the end of the layout, where the row of everything that is not
    # local lies.
    is_inside_M = (row_M >= offset) & (row_M < offset + num_rows) & gathered.is_local_M
    # An expert whose rows lie in two windows has a part in both, and an empty range in all others.
    # Windows begin at whole small blocks, so starts stay multiples of them.
    first_e = jnp.clip(start_e - offset, 0, num_rows)
    end_e = jnp.clip(start_e + gathered.size_e - offset, 0, num_rows)
    return jnp.where(is_inside_M, row_M - offset, num_rows), first_e, end_e - first_e


def _in_rounds(
    serve: Callable[..., jax.Array],
    x_nTD: jax.Array,
    gathered: _Assignments,
    num_rows: int,
    num_rounds: int,
) -> jax.Array:
    """Returns the sum of rounds of `num_rows` rows; rounds that nobody needs are skipped."""

    def one_round(y_nTD: jax.Array, offset: jax.Array) -> tuple[jax.Array, None]:
        def run(x_nTD: jax.Array, gate_M: jax.Array) -> jax.Array:
            # A policy would keep what is named of every round, needed or not.
            with kept.nothing():
                return serve(x_nTD, gate_M, offset, num_rows)

        def skip(x_nTD: jax.Array, gate_M: jax.Array) -> jax.Array:
            del x_nTD, gate_M
            return jnp.zeros_like(y_nTD)

        is_needed = offset < gathered.num_needed
        return y_nTD + jax.lax.cond(is_needed, run, skip, x_nTD, gathered.gate_M), None

    # The first round runs in any case, and is the carry that the others add to.
    first_y_nTD = serve(x_nTD, gathered.gate_M, 0, num_rows)
    offsets = jnp.arange(1, num_rounds, dtype=jnp.int32) * num_rows

    def further(y_nTD: jax.Array) -> jax.Array:
        # Rematerialised, so that the buffers of one round exist at a time.
        y_nTD, _ = jax.lax.scan(jax.checkpoint(one_round), y_nTD, offsets)
        return y_nTD

    # Asked once: a round that is skipped still adds zeros to all sums and gradients.
    return jax.lax.cond(num_rows < gathered.num_needed, further, lambda y: y, first_y_nTD)


DISPATCHER = Dispatcher(
    Options,
    apply,
    rows,
    received,
    drops=False,
    keeps=True,
    overflow="the rest waits a round",
)
