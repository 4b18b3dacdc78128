"""Dropless dispatch: every assignment is served, whatever the imbalance.

`exchange` chooses how tokens travel over the expert axis (n devices, T tokens of each, k experts of
a token):

- "gather" (dropless_gather.py): all tokens come to every device, each device works on the rows of
  its own experts, and a reduce-scatter brings the sums home. (n - 1) T rows are received, whatever
  k is.
- "ragged" (dropless_ragged.py): each assignment's row goes to the device of its expert and comes
  back (`jax.lax.ragged_all_to_all`). k T (n - 1) / n rows are received when the load is balanced.
  The idea is that of the all-to-all of GShard (Lepikhin et al. 2020, arXiv:2006.16668), without
  places that are never filled.

So "ragged" receives less where k < n. `slices` is for an axis that crosses a slow network, between
slices or hosts. Then tokens go to every slice once, and within it as `exchange` says; what a slice
makes of a token is summed before it goes back: (slices - 1) T rows cross each
way. DeepSeek-V3 (arXiv:2412.19437, section 3.2.2) sends a token to the nodes of its experts first,
and on from there.


`buffer` chooses the memory (dropless_rounds.py). 0: one round with room for the worst case,
n T min(k, e) rows. f >= 1: rounds of f times the balanced load; rounds that nobody needs are
skipped, so time grows with the imbalance and memory does not (each round is recomputed in the
backward pass).
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moe_jax.moe.dispatch import dropless_gather, dropless_ragged, dropless_rounds, levels
from moe_jax.moe.dispatch.contract import Dispatcher, Experts
from moe_jax.moe.dispatch.layout import Shape, round_up
from moe_jax.moe.dispatch.levels import Level
from moe_jax.moe.experts import direct
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
        "so few tokens that a buffer takes longer than computing have none "
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


def rows(shape: Shape, options: Options) -> int:
    """Returns the rows held at once per device: the worst case, or the buffer."""
    buffer = options.buffer
    if buffer < 0:
        buffer = 0 if platform() == "cpu" else ROUNDS
    if not buffer:
        return dropless_rounds.worst(shape)
    _, small_block = dropless_rounds.block(shape)
    # With a balanced load a device serves as many assignments as its own tokens make.
    num_rows = math.ceil(buffer * shape.own_intended)
    return min(dropless_rounds.worst(shape), round_up(num_rows, small_block))


def is_ragged(shape: Shape, options: Options) -> bool:
    """Returns whether rows travel by a ragged all-to-all, and not by a gather."""
    _, fast = levels.split(shape.expert_axis, options.slices)
    if fast.size == 1 or _is_direct(shape, options):
        return False
    if options.exchange != "auto":
        return options.exchange == "ragged"
    receives_less = shape.own_intended < shape.expert_axis * shape.num_tokens
    # Not on GPUs: XLA's latency hiding was seen to corrupt its backward pass (marin #8077, #8081).
    return platform() == "tpu" and receives_less


def _is_direct(shape: Shape, options: Options) -> bool:
    """Returns whether tokens have no buffer: that is allowed, and faster for so few."""
    if not options.direct:
        return False
    # The tokens of the whole expert axis come to each device.
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
        # One in `fast.size` of them is a token of its own.
        return from_slices + int(shape.own_intended * (fast.size - 1)) // fast.size
    # Each neighbour passes on what came to it from the other slices, too.
    return from_slices + (fast.size - 1) * slow.size * shape.num_tokens


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
    num_rows = rows(shape, options)
    if is_ragged(shape, options):
        check = options.check
        y_TD = dropless_ragged.apply(
            x_TD, routing, experts, shape, fast, num_rows=num_rows, check=check
        )
    else:
        is_direct = _is_direct(shape, options)
        y_TD = dropless_gather.apply(
            x_TD, routing, experts, shape, fast, num_rows=num_rows, is_direct=is_direct
        )
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
    # The tokens of the first slice come first in what is gathered.
    token_N = slow.gather(routing.token_N + slice_index * shape.num_tokens)
    # The first slice has the first experts.
    num_experts = shape.num_experts // slow.size
    expert_N = slow.gather(routing.expert_index_N) - slice_index * num_experts
    is_here_N = (expert_N >= 0) & (expert_N < num_experts)
    return slow.gather(x_TD), routing._replace(
        token_N=token_N,
        expert_index_N=jnp.where(is_here_N, expert_N, num_experts),
        gate_N=slow.gather(routing.gate_N),
        order_N=None,
    )


DISPATCHER = Dispatcher(
    Options,
    apply,
    rows,
    received,
    drops=False,
    keeps=True,
    worst=dropless_rounds.worst,
    overflow="the rest waits a round",
    advice=advice,
)
