"""What a dispatcher is.

Inside the layer's shard_map, all five mesh axes manual:

    apply(x_TD, routing, experts, *, shape, options) -> (y_TD, dropped_N)

It moves tokens to the devices of their experts, calls `experts.grouped(x_RD, gate_R, start_e,
size_e, block) -> y_RD` on rows that are grouped by local expert (the layout is stated in
moe/experts/grouped_matmul.py), and brings the weighted results back: y_t = sum over the assignments
of t of gate * expert(x_t). y_TD is still a partial sum over `model` and `seq`. dropped_N flags the
assignments of *this* device that found no room. `rows(shape, options)` is the static number of rows
R held at once per device: the memory is known before step 1.

A dispatcher is correct when it equals tests/oracle.py for every kind of routing, on every mesh,
forward and gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax


class Experts(NamedTuple):
    """The experts of one device, as a dispatcher calls them."""

    # (x_RD, gate_R, start_e, size_e, block) -> y_RD, of rows that are grouped by expert.
    grouped: Callable[..., jax.Array]
    # (x_TD, token_M, expert_index_M, gate_M) -> y_TD, of few tokens in any order (direct.py);
    # None = these experts have no such way.
    direct: Callable[..., jax.Array] | None = None


def no_advice(options: Any, at: str, expert_axis: int) -> Iterator[str]:
    """Says that every option does something on every mesh."""
    del options, at, expert_axis
    yield from ()


def of_the_training(options: Any) -> bool:
    """Says that what drops is a matter of training alone."""
    del options
    return False


def as_given(options: Any, num_experts: int) -> Any:
    """Returns the options of a dispatcher that has room for every assignment anyway."""
    del num_experts
    return options


class Dispatcher(NamedTuple):
    """Holds all that there is to know of a dispatcher; `DISPATCHER` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    apply: Callable[..., tuple[jax.Array, jax.Array]]
    rows: Callable[..., Any]
    # (shape, options) -> the rows that a device receives from the others of the expert axis on
    # their way to the experts. As many come back, and both ways are taken again backward.
    received: Callable[..., int]
    # Assignments may find no room: then the order of priority, and whoever shares the room, matter.
    drops: bool
    # It takes the Slots of a router that mixes tokens, instead of a Routing.
    mixes: bool = False
    # model.remat = "dispatch" keeps what has travelled: on the way to the experts it is not sent
    # again.
    keeps: bool = False
    # Rows travel by all-to-all, and not by a gather.
    exchanges: bool = False
    # (shape) -> the rows that a device may have to serve, of a dispatcher that never drops.
    worst: Callable[..., int] | None = None
    # What happens to the load beyond the rows that are held, for the resource card; "" = there is
    # none.
    overflow: str = ""
    # options -> what drops is a property of the model, so that it drops at evaluation, in an
    # encoder and in a model that is exported, too.
    of_the_model: Callable[[Any], bool] = of_the_training
    # (options, E) -> the options with which every assignment has room: what plain arithmetic over
    # all experts is compared with.
    roomy: Callable[[Any, int], Any] = as_given
    # (options, the path of its block, the length of the expert axis) -> what a run is told at its
    # start, one sentence each.
    advice: Callable[[Any, str, int], Iterator[str]] = no_advice
