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

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe.dispatch.contract import Dispatcher
from moe_jax.moe.dispatch.exchange import all_gather, reduce_scatter
from moe_jax.moe.dispatch.layout import Shape, assignment_of_row, rank_in, round_up
from moe_jax.moe.experts.grouped_matmul import block_sizes, sum_rows, take_rows
from moe_jax.moe.routing.contract import Routing
from moe_jax.schema.options import NONE_OR_FROM_ONE, option


@dataclasses.dataclass(frozen=True)
class Options:
    buffer: float = option(
        0.0,
        "rows held at once, as a factor of the balanced load; 0 = the worst case in one round",
        NONE_OR_FROM_ONE,
    )


def _block(shape: Shape) -> tuple[int, int]:
    return block_sizes(shape.num_assignments * shape.expert_axis / shape.num_experts)


def worst(shape: Shape) -> int:
    """Rows that one device may have to serve: a token's experts are distinct, so at most min(k, e)
    of them are local.
    """
    n, e = shape.expert_axis, shape.num_experts // shape.expert_axis
    small = _block(shape)[1]
    local = min(shape.per_token, e) * shape.num_tokens if shape.per_token else shape.num_assignments
    return round_up(n * local + e * (small - 1), small)


def rows(shape: Shape, options: Options) -> int:
    """Rows held at once per device: the worst case, or the buffer."""
    if not options.buffer:
        return worst(shape)
    return min(
        worst(shape), round_up(math.ceil(options.buffer * shape.num_intended), _block(shape)[1])
    )


def apply(
    x_TD: jax.Array,
    routing: Routing,
    experts: Callable[..., jax.Array],
    *,
    shape: Shape,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """See the contract in moe/dispatch/__init__.py. Nothing drops."""
    e, block = shape.num_experts // shape.expert_axis, _block(shape)
    with jax.named_scope("dispatch"):
        x_nTD, token_M, expert_index_M, gate_M = _gather(x_TD, routing, shape)
        local_M = expert_index_M - jax.lax.axis_index("expert") * e
        local_M = jnp.where((local_M >= 0) & (local_M < e), local_M, e)
        rank_M, count_e, _ = rank_in(local_M, e + 1)
        room_e = -(-count_e[:e] // block[1]) * block[1]
        start_e = jnp.cumsum(room_e) - room_e
        row_M = jnp.where(
            local_M < e, start_e.at[local_M].get(mode="fill", fill_value=0) + rank_M, worst(shape)
        )

    def serve(x_nTD, gate_M, offset, num_rows):
        """The weighted results of the rows [offset, offset + num_rows) of the layout, summed per
        token.
        """
        with jax.named_scope("dispatch"):
            here_M = (row_M >= offset) & (row_M < offset + num_rows) & (local_M < e)
            place_M = jnp.where(here_M, row_M - offset, num_rows)
            assignment_R = assignment_of_row(place_M, num_rows)
            src_R = token_M.at[assignment_R].get(mode="fill", fill_value=x_nTD.shape[0])
            dest_TK = place_M.reshape(-1, shape.per_token) if shape.per_token else None
            x_RD = checkpoint_name(take_rows(x_nTD, src_R, dest_TK), "moe_dispatch")
            gate_R = gate_M.at[assignment_R].get(mode="fill", fill_value=0)
            first_e = jnp.clip(start_e - offset, 0, num_rows)
            size_e = jnp.clip(start_e + count_e[:e] - offset, 0, num_rows) - first_e
        y_RD = experts(x_RD, gate_R, first_e, size_e, block)
        with jax.named_scope("combine"):
            return sum_rows(y_RD, dest_TK, src_R, x_nTD.shape[0])

    num_rows, needed = rows(shape, options), room_e.sum()
    rounds = -(-worst(shape) // num_rows)
    if rounds == 1:
        y_nTD = serve(x_nTD, gate_M, 0, num_rows)
    else:
        y_nTD = _in_rounds(serve, x_nTD, gate_M, num_rows, rounds, needed)
    with jax.named_scope("combine"):
        y_TD = reduce_scatter(y_nTD, "expert", 0)
    return y_TD, jnp.zeros_like(routing.expert_index_N, dtype=bool)


def _gather(x_TD: jax.Array, routing: Routing, shape: Shape) -> tuple[jax.Array, ...]:
    """Tokens and assignments of the whole expert axis, in the order of its devices."""

    def gather(z):
        return all_gather(z, "expert", 0)

    token_N = routing.token_N + jax.lax.axis_index("expert").astype(jnp.int32) * shape.num_tokens
    return (
        gather(x_TD),
        gather(token_N),
        gather(routing.expert_index_N),
        gather(routing.gate_N),
    )


def _in_rounds(serve, x_TD, gate_M, num_rows: int, rounds: int, needed: jax.Array) -> jax.Array:
    """Rounds of `num_rows` rows until `needed` are served.

    The body is rematerialised, so one round's buffers exist at a time.
    """

    def body(y_TD, offset):
        def run(x, gate):
            return serve(x, gate, offset, num_rows)

        def idle(x, gate):
            return jnp.zeros_like(y_TD)

        return y_TD + jax.lax.cond(offset < needed, run, idle, x_TD, gate_M), None

    first = serve(x_TD, gate_M, 0, num_rows)
    offsets = jnp.arange(1, rounds, dtype=jnp.int32) * num_rows
    return jax.lax.scan(jax.checkpoint(body), first, offsets)[0]


DISPATCHER = Dispatcher(Options, apply, rows, drops=False, overflow="the rest waits a round")
