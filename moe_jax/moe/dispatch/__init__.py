"""Dispatchers: how tokens reach their experts and come back.

A dispatcher never knows which router ran.

A new dispatcher is one file here and one line in DISPATCHERS. Contract, inside the layer's
shard_map (all five mesh axes manual):

    apply(x_TD, routing, experts, *, shape, options) -> (y_TD, dropped_N)

It moves tokens to the devices of their experts, calls `experts(x_RD, gate_R, start_e, size_e,
block) -> y_RD` on rows that are grouped by local expert (the layout is stated in
moe/grouped_matmul.py), and brings the weighted results back: y_t = sum over the assignments of t of
gate * expert(x_t). y_TD is still a partial sum over `model`. dropped_N flags the assignments of
*this* device that found no place. `rows(shape, options)` is the static number of rows R held at
once per device: the memory is known before step 1.

"slots" alone takes `Slots` instead of a Routing (moe/routing/soft.py); there are no assignments
then, and dropped_N is empty.

A dispatcher is correct when it equals tests/oracle.py for every kind of routing, on every mesh,
forward and gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from moe_jax.moe.dispatch import capacity, dropless, slots


class Dispatcher(NamedTuple):
    apply: Callable[..., tuple[jax.Array, jax.Array]]
    rows: Callable[..., Any]


DISPATCHERS: dict[str, Dispatcher] = {
    "capacity": Dispatcher(capacity.apply, capacity.rows),
    "dropless": Dispatcher(dropless.apply, dropless.rows),
    "slots": Dispatcher(slots.apply, slots.rows),
}
