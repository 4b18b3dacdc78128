"""Dropless dispatch through a ragged all-to-all: each assignment's row goes to the device of its
expert and comes back.

Shapes: n devices of a level, E experts of all of them, e experts of this one, N assignments of this
device, R rows of a round, S slices of rows that travel (ragged.py), M = n N.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe import kept
from moe_jax.moe.dispatch import dropless_rounds, ragged
from moe_jax.moe.dispatch.contract import Experts
from moe_jax.moe.dispatch.dropless_rounds import serve_in_rounds
from moe_jax.moe.dispatch.exchange import SAVED
from moe_jax.moe.dispatch.layout import Shape, assignment_of_row
from moe_jax.moe.dispatch.levels import Level
from moe_jax.moe.experts.gathers import sum_rows, take_rows
from moe_jax.moe.ranks import rank_in
from moe_jax.moe.routing.contract import Routing

# All axes whose devices have tokens of their own.
AXES = ("data", "expert", "seq")


class _Plan(NamedTuple):
    """Holds which rows go where."""

    # The rows of each device for each expert.
    counts_nE: jax.Array
    # The first row of each expert among the rows that each device sends.
    source_nE: jax.Array
    # Where they come to lie among all rows of the receiver.
    target_nE: jax.Array
    # The rows of the experts of this device.
    start_e: jax.Array
    size_e: jax.Array
    # The most rows of a receiver, of the whole mesh.
    num_needed: jax.Array


def apply(
    x_TD: jax.Array,
    routing: Routing,
    experts: Experts,
    shape: Shape,
    level: Level,
    *,
    num_rows: int,
    check: bool,
) -> jax.Array:
    """Returns y_TD, [T, D]: of each token the weighted sum over its experts on this level.

    Args:
      level: the devices that exchange.
      num_rows: the rows of a round.
      check: the bits that travel are counted (ragged.py).
    """
    block = dropless_rounds.block(shape)
    num_tokens, num_places = x_TD.shape[0], routing.expert_index_N.shape[0]
    # 1. This device lays out a row for each of its assignments.
    with jax.named_scope("dispatch"):
        row_N, counts_nE = _sorted_rows(routing, shape, level)
        plan = _plan(counts_nE, shape, level)
        assignment_N = assignment_of_row(row_N, num_places)
        # A void row gets the token T, which is out of bounds: `take_rows` makes it zero.
        src_N = routing.token_N.at[assignment_N].get(mode="fill", fill_value=num_tokens)
        # The list of assignments is in the order of tokens, K entries each: [T, K].
        dest_TK = row_N.reshape(-1, shape.per_token) if shape.per_token else None
        # A row for each assignment, in the order of experts, and so of devices.
        x_ND = take_rows(x_TD, src_N, dest_TK)
        gate_N = routing.gate_N.at[assignment_N].get(mode="fill", fill_value=0)
        # A TPU would send each number as a row of 128: a gather of them is less.
        gate_M = level.gather(gate_N)

    def serve(x_ND: jax.Array, gate_M: jax.Array, offset: Any, num_rows: int) -> jax.Array:
        """Returns y_TD of the rows [offset, offset + num_rows) of the receivers' layouts."""
        with jax.named_scope("dispatch"):
            journey = _journey(plan, offset, num_rows, shape, level)
            x_RD = ragged.exchange(x_ND, journey, num_rows, level, check)
            if kept.is_named():
                x_RD = checkpoint_name(x_RD, SAVED)
            origin_R = _origin(journey.back, num_rows, num_places, level)
            gate_R = gate_M.at[origin_R].get(mode="fill", fill_value=0)
            first_e, size_e = dropless_rounds.part(plan.start_e, plan.size_e, offset, num_rows)
        y_RD = experts.grouped(x_RD, gate_R, first_e, size_e, block)
        with jax.named_scope("combine"):
            y_ND = ragged.exchange(y_RD, journey.reversed(), num_places, level, check)
            return sum_rows(y_ND, dest_TK, src_N, num_tokens)

    # 2. Rows travel to the device of their expert, are computed there and travel back.
    return serve_in_rounds(serve, x_ND, gate_M, plan.num_needed, shape, num_rows)


def _sorted_rows(routing: Routing, shape: Shape, level: Level) -> tuple[jax.Array, jax.Array]:
    """Returns (the row of each assignment in the order of experts, N = nowhere; the assignments of
    every device to every expert of the level, [n, E]).
    """
    num_experts = level.size * shape.local_experts
    expert_N = routing.expert_index_N
    # One class more, for assignments to nowhere.
    rank_N, count, _ = rank_in(expert_N, num_experts + 1)
    count_E = count[:num_experts]
    # The exclusive sum: where the rows of each expert begin.
    first_E = jnp.cumsum(count_E) - count_E
    first_N = first_E.at[expert_N].get(mode="fill", fill_value=0)
    row_N = jnp.where(expert_N < num_experts, first_N + rank_N, expert_N.shape[0])
    return row_N, level.gather(count_E[None])


def _plan(counts_nE: jax.Array, shape: Shape, level: Level) -> _Plan:
    """Returns which rows go where. Every device has the counts of all, so all make the same plan
    without asking again.
    """
    n, e = level.size, shape.local_experts
    # What each device receives for each of its experts.
    size_ne = counts_nE.sum(0, dtype=counts_nE.dtype).reshape(n, e)
    start_ne, needed_n = dropless_rounds.rooms(size_ne, shape)
    # In the room of an expert, the rows of the first device come first.
    before_nE = jnp.cumsum(counts_nE, axis=0) - counts_nE
    me = level.place()
    # jax 0.12 takes the largest only over axes over which a number varies.
    nothing = 0 * jax.lax.axis_index(AXES)
    return _Plan(
        counts_nE=counts_nE,
        # A sender's rows are in the order of experts.
        source_nE=jnp.cumsum(counts_nE, axis=1) - counts_nE,
        target_nE=start_ne.reshape(1, n * e) + before_nE,
        start_e=start_ne[me],
        size_e=size_ne[me],
        # Rounds have collectives: all devices take them, or none.
        num_needed=jax.lax.pmax(needed_n.max() + nothing, AXES),
    )


def _journey(plan: _Plan, offset: Any, num_rows: int, shape: Shape, level: Level) -> ragged.Journey:
    """Returns how the rows [offset, offset + num_rows) of the receivers' layouts travel."""
    n, e, me = level.size, shape.local_experts, level.place()
    target_nE, size_nE = dropless_rounds.part(plan.target_nE, plan.counts_nE, offset, num_rows)
    # What earlier rounds have taken of a slice.
    taken_nE = jnp.clip(offset - plan.target_nE, 0, plan.counts_nE)
    source_nE = plan.source_nE + taken_nE

    def to_me(z_nE: jax.Array) -> jax.Array:
        """Returns what every device has for the experts of this one, [n e]."""
        return z_nE.reshape(n, n, e)[:, me].reshape(-1)

    # There is a slice for each expert of the level, and each pair of devices exchanges e of them.
    there = ragged.Slices(source_nE[me], size_nE[me], target_nE[me])
    back = ragged.Slices(to_me(target_nE), to_me(size_nE), to_me(source_nE))
    return ragged.Journey(there, back)


def _origin(back: ragged.Slices, num_rows: int, num_places: int, level: Level) -> jax.Array:
    """Returns where each row comes from, [R]: its place in the lists of N = num_places rows of all
    devices of a level, one after another; n N = nothing arrived there.
    """
    n = level.size

    def as_they_lie(z_S: jax.Array) -> jax.Array:
        """Puts slices into the order of rows: from (device, expert) to (expert, device)."""
        return z_S.reshape(n, -1).T.reshape(-1)

    start_S, size_S, source_S = (as_they_lie(z_S) for z_S in back)
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    # The slices that have begun by each row. Of those that begin at one row the last is the one
    # that is not empty.
    begins_R = jnp.zeros_like(start_S, shape=(num_rows,)).at[start_S].add(1, mode="drop")
    slice_R = jnp.cumsum(begins_R) - 1
    # As slices lie, the device runs fastest.
    device_R = slice_R % n
    within_R = row_R - start_S[slice_R]
    origin_R = device_R * num_places + source_S[slice_R] + within_R
    # Beyond the end of its slice a row is void.
    return jnp.where(within_R < size_S[slice_R], origin_R, n * num_places)
