"""Dropless dispatch: every assignment is served, whatever the imbalance.

`exchange` chooses how tokens travel over the expert axis (n devices, T tokens of each, k experts of
a token):

- "gather": all tokens come to every device, each device works on the rows of its own experts, and a
  reduce-scatter brings the sums home. (n - 1) T rows are received, whatever k is.
- "ragged": each assignment's row goes to the device of its expert and comes back
  (`jax.lax.ragged_all_to_all`, ragged.py). k T (n - 1) / n rows are received when the load is
  balanced. The idea is that of the all-to-all of GShard (Lepikhin et al. 2020, arXiv:2006.16668),
  without places that are never filled.

So "ragged" receives less where k < n. `slices` is for an axis that crosses a slow network, between
slices or hosts. Then tokens go to every slice once, and within it as `exchange` says; what a slice
makes of a token is summed before it goes back: (slices - 1) T rows cross each
way. DeepSeek-V3 (arXiv:2412.19437, section 3.2.2) sends a token to the nodes of its experts first,
and on from there.

`buffer` chooses the memory. 0: one round with room for the worst case, n T min(k, e) rows. f >= 1:
rounds of f times the balanced load; rounds that nobody needs are skipped, so time grows with the
imbalance and memory does not (each round is recomputed in the backward pass).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.moe import kept
from moe_jax.moe.dispatch import levels, ragged
from moe_jax.moe.dispatch.contract import Dispatcher, Experts
from moe_jax.moe.dispatch.exchange import SAVED
from moe_jax.moe.dispatch.layout import Shape, assignment_of_row, rank_in, round_up
from moe_jax.moe.dispatch.levels import Level
from moe_jax.moe.experts import direct
from moe_jax.moe.experts.blocks import block_sizes
from moe_jax.moe.experts.gathers import sum_rows, take_rows
from moe_jax.moe.routing.contract import Routing
from moe_jax.parallel.compiling import platform
from moe_jax.schema.options import NUMBER, option, real

# The buffer of accelerators, whose memory is small, where the config names none.
ROUNDS = 1.25
BUFFER = real("-1, 0 or at least 1", lambda f: f in (-1, 0) or f >= 1)


@dataclasses.dataclass(frozen=True)
class Options:
    buffer: float = option(
        -1.0,
        "rows held at once, as a factor of the balanced load; 0 = the worst case in one round; -1 "
        "= 0 on a CPU, 1.25 elsewhere",
        BUFFER,
    )
    direct: bool = option(
        False,
        "so few tokens that sorting takes longer than computing are not sorted "
        "(moe/experts/direct.py); decoding sets it",
    )
    exchange: str = option(
        "auto",
        'how tokens travel over the expert axis: "gather", "ragged" (a row for each assignment), '
        'or "auto" = "ragged" on a TPU where k < the length of the axis, else "gather"',
        choices=("auto", "gather", "ragged"),
    )
    check: bool = option(
        False,
        '"ragged" counts the bits that travel, forward and backward; where other bits arrive, all '
        "is NaN (docs/exchange.md)",
    )
    slices: int = option(
        1,
        "slices or hosts that the expert axis crosses: a token goes to each of them once; 1 = the "
        "axis is one network",
        NUMBER,
    )


def advice(options: Options, at: str, expert_axis: int) -> Iterator[str]:
    """Yields options that do nothing on this mesh."""
    if expert_axis % options.slices:
        yield (
            f"{at}.slices = {options.slices} does nothing, because it does not divide mesh.expert "
            f"= {expert_axis}: tokens travel as on one network"
        )
    if options.check and options.exchange == "gather":
        yield f'{at}.check = True checks nothing, because {at}.exchange = "gather"'


def _block(shape: Shape) -> tuple[int, int]:
    """Returns the blocks of the grouped product for the mean load of an expert."""
    return block_sizes(shape.mean_load)


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
    buffer = options.buffer
    if buffer < 0:
        buffer = 0 if platform() == "cpu" else ROUNDS
    if not buffer:
        return worst(shape)
    _, small_block = _block(shape)
    # With a balanced load a device serves as many assignments as its own tokens make.
    num_rows = math.ceil(buffer * shape.own_intended)
    return min(worst(shape), round_up(num_rows, small_block))


def is_ragged(shape: Shape, options: Options) -> bool:
    """Returns whether rows travel by a ragged all-to-all, and not by a gather."""
    _, fast = levels.split(shape.expert_axis, options.slices)
    if fast.size == 1 or _is_direct(shape, options):
        return False
    if options.exchange != "auto":
        return options.exchange == "ragged"
    # On GPUs, XLA's latency hiding was seen to corrupt its backward pass (marin #8077, #8081).
    receives_less = shape.own_intended < shape.expert_axis * shape.num_tokens
    return platform() == "tpu" and receives_less


def _is_direct(shape: Shape, options: Options) -> bool:
    return options.direct and _are_few(shape)


def _are_few(shape: Shape) -> bool:
    """Returns whether the tokens of the expert axis are computed faster without being sorted."""
    n = shape.expert_axis
    return direct.is_faster(n * shape.num_tokens, n * shape.num_assignments, shape.local_experts)


def received(shape: Shape, options: Options) -> int:
    """Returns the rows that a device receives from others.

    By a gather they are the tokens of the axis but its own. By a ragged all-to-all they are those
    of its experts, if the load is balanced, and the tokens of other slices.
    """
    slow, fast = levels.split(shape.expert_axis, options.slices)
    from_slices = (slow.size - 1) * shape.num_tokens
    if is_ragged(shape, options):
        return from_slices + int(shape.own_intended * (fast.size - 1)) // fast.size
    return from_slices + (fast.size - 1) * slow.size * shape.num_tokens


class _Assignments(NamedTuple):
    """Holds the M assignments of the devices that gather, and where the local ones lie."""

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
    dropped_N = jnp.zeros_like(routing.expert_index_N, dtype=bool)
    slow, fast = levels.split(shape.expert_axis, options.slices)
    if slow.size > 1:
        with jax.named_scope("dispatch"):
            x_TD, routing = _to_slices(x_TD, routing, shape, slow)
    through = _through_ragged if is_ragged(shape, options) else _through_gather
    y_TD = through(x_TD, routing, experts, shape, options, fast)
    if slow.size > 1:
        # What the devices of a slice made of a token is one sum by now: it crosses once.
        with jax.named_scope("combine"):
            y_TD = slow.scatter(y_TD)
    return y_TD, dropped_N


def _to_slices(
    x_TD: jax.Array, routing: Routing, shape: Shape, slow: Level
) -> tuple[jax.Array, Routing]:
    """Returns the tokens of the devices at this place of every slice, and their assignments to the
    experts of this slice.

    Experts are numbered within the slice; those of other slices are nowhere.
    """

    slice_index = slow.place().astype(jnp.int32)
    token_N = slow.gather(routing.token_N + slice_index * shape.num_tokens)
    num_experts = shape.num_experts // slow.size
    expert_N = slow.gather(routing.expert_index_N) - slice_index * num_experts
    is_here_N = (expert_N >= 0) & (expert_N < num_experts)
    return slow.gather(x_TD), routing._replace(
        token_N=token_N,
        expert_index_N=jnp.where(is_here_N, expert_N, num_experts),
        gate_N=slow.gather(routing.gate_N),
        order_N=None,
    )


def _through_gather(
    x_TD: jax.Array,
    routing: Routing,
    experts: Experts,
    shape: Shape,
    options: Options,
    level: Level,
) -> jax.Array:
    """Returns y_TD by a gather and a reduce-scatter over the devices of a level."""
    block = _block(shape)
    # 1. All n T tokens of the level and their M = n N assignments come to every device.
    with jax.named_scope("dispatch"):
        x_nTD, gathered = _gather(x_TD, routing, shape, level)
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

    # 2. The rows of the local experts are served.
    if _is_direct(shape, options) and experts.direct:
        y_nTD = experts.direct(x_nTD, gathered.token_M, gathered.local_index_M, gathered.gate_M)
    else:
        y_nTD = _served(serve, x_nTD, gathered.gate_M, gathered.num_needed, shape, options)
    # 3. Each device has the sums over its own experts, for all n T tokens: they are added up over
    # the level, and each device keeps its T tokens.
    with jax.named_scope("combine"):
        return level.scatter(y_nTD)


def _gather(
    x_TD: jax.Array, routing: Routing, shape: Shape, level: Level
) -> tuple[jax.Array, _Assignments]:
    """Returns the tokens of all devices of a level, in the order of its devices, and their
    assignments.
    """

    device = level.place()
    # Numbered over the whole level, as the gathered tokens lie.
    token_N = routing.token_N + device.astype(jnp.int32) * x_TD.shape[0]
    x_nTD, token_M = level.gather(x_TD), level.gather(token_N)
    expert_index_M, gate_M = level.gather(routing.expert_index_N), level.gather(routing.gate_N)

    # Local experts are numbered from 0; those of other devices, and nowhere, are number e.
    e = shape.local_experts
    local_index_M = expert_index_M - device * e
    local_index_M = jnp.where((local_index_M >= 0) & (local_index_M < e), local_index_M, e)
    is_local_M = local_index_M < e
    rank_M, count, _ = rank_in(local_index_M, e + 1)
    # The last class, e, is that of all others.
    size_e = count[:e]

    start_e, num_needed = _rooms(size_e, shape)
    start_M = start_e.at[local_index_M].get(mode="fill", fill_value=0)
    row_M = jnp.where(is_local_M, start_M + rank_M, worst(shape))
    return x_nTD, _Assignments(
        token_M, local_index_M, gate_M, row_M, is_local_M, start_e, size_e, num_needed
    )


def _rooms(size_ne: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """Returns (where the room of each expert begins, the rows of all rooms), of the numbers of rows
    of a device's experts, [..., e].
    """
    # Each expert starts at a multiple of the small block.
    _, small_block = _block(shape)
    room_ne = -(-size_ne // small_block) * small_block
    # The exclusive sum.
    return jnp.cumsum(room_ne, axis=-1) - room_ne, room_ne.sum(-1, dtype=room_ne.dtype)


def _window(
    gathered: _Assignments, offset: Any, num_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (row_M, first_e, size_e) of the rows [offset, offset + num_rows), counted from 0.

    The row of an assignment that lies outside is num_rows.
    """
    row_M = gathered.row_M
    # The last window may reach past the end of the layout, where the row of everything that is not
    # local lies.
    is_inside_M = (row_M >= offset) & (row_M < offset + num_rows) & gathered.is_local_M
    # An expert whose rows lie in two windows has a part in both, and an empty range in all others.
    # Windows begin at whole small blocks, so starts stay multiples of them.
    first_e, size_e = _part(gathered.start_e, gathered.size_e, offset, num_rows)
    return jnp.where(is_inside_M, row_M - offset, num_rows), first_e, size_e


def _served(
    serve: Callable[..., jax.Array],
    x: jax.Array,
    gate: jax.Array,
    num_needed: jax.Array,
    shape: Shape,
    options: Options,
) -> jax.Array:
    """Returns `serve(x, gate, offset, num_rows)`, in one round where the buffer holds all rows."""
    num_rows = rows(shape, options)
    num_rounds = -(-worst(shape) // num_rows)
    if num_rounds == 1:
        return serve(x, gate, 0, num_rows)
    return _in_rounds(serve, x, gate, num_needed, num_rows, num_rounds)


def _in_rounds(
    serve: Callable[..., jax.Array],
    x: jax.Array,
    gate: jax.Array,
    num_needed: jax.Array,
    num_rows: int,
    num_rounds: int,
) -> jax.Array:
    """Returns the sum of rounds of `num_rows` rows; rounds that nobody needs are skipped."""

    def one_round(y: jax.Array, offset: jax.Array) -> tuple[jax.Array, None]:
        def run(x: jax.Array, gate: jax.Array) -> jax.Array:
            # A policy would keep what is named of every round, needed or not.
            with kept.nothing():
                return serve(x, gate, offset, num_rows)

        def skip(x: jax.Array, gate: jax.Array) -> jax.Array:
            del x, gate
            return jnp.zeros_like(y)

        return y + jax.lax.cond(offset < num_needed, run, skip, x, gate), None

    # The first round runs in any case, and is the carry that the others add to.
    first_y = serve(x, gate, 0, num_rows)
    offsets = jnp.arange(1, num_rounds, dtype=jnp.int32) * num_rows

    def further(y: jax.Array) -> jax.Array:
        # Rematerialised, so that the buffers of one round exist at a time.
        y, _ = jax.lax.scan(jax.checkpoint(one_round), y, offsets)
        return y

    # Asked once: a round that is skipped still adds zeros to all sums and gradients.
    return jax.lax.cond(num_rows < num_needed, further, lambda y: y, first_y)


def _through_ragged(
    x_TD: jax.Array,
    routing: Routing,
    experts: Experts,
    shape: Shape,
    options: Options,
    level: Level,
) -> jax.Array:
    """Returns y_TD by a ragged all-to-all over the devices of a level, there and back."""
    block = _block(shape)
    num_tokens, num_places = x_TD.shape[0], routing.expert_index_N.shape[0]
    with jax.named_scope("dispatch"):
        row_N, counts_nE = _sorted_rows(routing, shape, level)
        plan = _plan(counts_nE, shape, level)
        assignment_N = assignment_of_row(row_N, num_places)
        src_N = routing.token_N.at[assignment_N].get(mode="fill", fill_value=num_tokens)
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
            x_RD = ragged.exchange(x_ND, journey, num_rows, level, options.check)
            if kept.is_named():
                x_RD = checkpoint_name(x_RD, SAVED)
            origin_R = _origin(journey.back, num_rows, num_places, level)
            gate_R = gate_M.at[origin_R].get(mode="fill", fill_value=0)
            first_e, size_e = _part(plan.start_e, plan.size_e, offset, num_rows)
        y_RD = experts.grouped(x_RD, gate_R, first_e, size_e, block)
        with jax.named_scope("combine"):
            y_ND = ragged.exchange(y_RD, journey.reversed(), num_places, level, options.check)
            return sum_rows(y_ND, dest_TK, src_N, num_tokens)

    return _served(serve, x_ND, gate_M, plan.num_needed, shape, options)


class _Plan(NamedTuple):
    """Holds which rows go where; n devices of a level, E experts of all of them, e of this one."""

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


def _sorted_rows(routing: Routing, shape: Shape, level: Level) -> tuple[jax.Array, jax.Array]:
    """Returns (the row of each assignment in the order of experts, N = nowhere; the assignments of
    every device to every expert of the level, [n, E]).
    """
    num_experts = level.size * shape.local_experts
    expert_N = routing.expert_index_N
    rank_N, count, _ = rank_in(expert_N, num_experts + 1)
    count_E = count[:num_experts]
    first_N = (jnp.cumsum(count_E) - count_E).at[expert_N].get(mode="fill", fill_value=0)
    row_N = jnp.where(expert_N < num_experts, first_N + rank_N, expert_N.shape[0])
    return row_N, level.gather(count_E[None])


def _plan(counts_nE: jax.Array, shape: Shape, level: Level) -> _Plan:
    n, e = level.size, shape.local_experts
    size_ne = counts_nE.sum(0, dtype=counts_nE.dtype).reshape(n, e)
    start_ne, needed_n = _rooms(size_ne, shape)
    # Of an expert's rows come first those of the first device.
    before_nE = jnp.cumsum(counts_nE, axis=0) - counts_nE
    me = level.place()
    return _Plan(
        counts_nE=counts_nE,
        source_nE=jnp.cumsum(counts_nE, axis=1) - counts_nE,
        target_nE=start_ne.reshape(1, n * e) + before_nE,
        start_e=start_ne[me],
        size_e=size_ne[me],
        # Rounds have collectives: all devices take them, or none.
        num_needed=jax.lax.pmax(needed_n.max(), ("data", "expert", "seq")),
    )


def _journey(plan: _Plan, offset: Any, num_rows: int, shape: Shape, level: Level) -> ragged.Journey:
    """Returns how the rows [offset, offset + num_rows) of the receivers' layouts travel."""
    n, e, me = level.size, shape.local_experts, level.place()
    target_nE, size_nE = _part(plan.target_nE, plan.counts_nE, offset, num_rows)
    # What earlier rounds have taken of a slice.
    taken_nE = jnp.clip(offset - plan.target_nE, 0, plan.counts_nE)
    source_nE = plan.source_nE + taken_nE

    def to_me(z_nE: jax.Array) -> jax.Array:
        """Returns what every device has for the experts of this one, [n e]."""
        return z_nE.reshape(n, n, e)[:, me].reshape(-1)

    there = ragged.Slices(source_nE[me], size_nE[me], target_nE[me])
    back = ragged.Slices(to_me(target_nE), to_me(size_nE), to_me(source_nE))
    return ragged.Journey(there, back)


def _origin(back: ragged.Slices, num_rows: int, num_places: int, level: Level) -> jax.Array:
    """Returns where each row comes from, [R]: its place in the lists of N = num_places rows of all
    devices of a level, one after another; n N = nothing arrived there.
    """
    n = level.size

    def as_they_lie(z_S: jax.Array) -> jax.Array:
        """From (device, expert) to (expert, device): in the order of rows."""
        return z_S.reshape(n, -1).T.reshape(-1)

    start_S, size_S, source_S = (as_they_lie(z_S) for z_S in back)
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    # The slices that have begun by each row. Of those that begin at one row the last is the one
    # that is not empty.
    begins_R = jnp.zeros_like(start_S, shape=(num_rows,)).at[start_S].add(1, mode="drop")
    slice_R = jnp.cumsum(begins_R) - 1
    device_R = slice_R % n
    within_R = row_R - start_S[slice_R]
    origin_R = device_R * num_places + source_S[slice_R] + within_R
    return jnp.where(within_R < size_S[slice_R], origin_R, n * num_places)


def _part(
    start: jax.Array, size: jax.Array, offset: Any, num_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Returns (first, size) of the part of runs of rows that lies in [offset, offset + num_rows),
    counted from the offset; of size 0 where there is none.
    """
    first = jnp.clip(start - offset, 0, num_rows)
    return first, jnp.clip(start + size - offset, 0, num_rows) - first


DISPATCHER = Dispatcher(
    Options,
    apply,
    rows,
    received,
    drops=False,
    keeps=True,
    worst=worst,
    overflow="the rest waits a round",
    advice=advice,
)
