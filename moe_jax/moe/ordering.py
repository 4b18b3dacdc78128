"""Orderings: which assignment wins when capacity is short. Any ordering goes with any token-choice router.

An ordering is `apply(routing, *, num_experts, group_tokens, options) -> Routing`, on the assignments of one device. It never moves tokens
between groups. It may set `order_N` (the entries in order of priority) or send assignments nowhere, which it counts per row in
`sums["dropped"]`. `sees_future`: may a later token change an earlier output, given a dispatcher that drops; `always`: without one, too.

Shapes: N assignments, T tokens of this device, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

from moe_jax.moe.routing.contract import Routing


class Ordering(NamedTuple):
    apply: Callable[..., Routing]
    sees_future: bool  # where a dispatcher drops
    always: bool  # sees the future with every dispatcher


def token_major(routing: Routing, **sizes) -> Routing:
    """As the router lists them: token by token, a token's choices in order of falling gate. Causal: later tokens never win over earlier."""
    del sizes
    return routing


ORDERINGS: dict[str, Ordering] = {
    "token_major": Ordering(token_major, sees_future=False, always=False),
}
