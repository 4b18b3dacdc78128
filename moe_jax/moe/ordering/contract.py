"""What an ordering is, and what orderings share.

An ordering is `apply(routing, *, num_experts, num_tokens, group_tokens, train, options) ->
Routing`, on the assignments of one device. It never moves tokens between groups. It may set
`order_N` (the entries in order of priority) or send assignments nowhere, which it counts per row in
`sums["dropped"]`.

Shapes: N assignments, T tokens of this device, E experts, G groups, b rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.moe.ranks import rank_in
from moe_jax.moe.routing.contract import Routing


class Ordering(NamedTuple):
    """Holds all that there is to know of an ordering; `ORDERING` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    apply: Callable[..., Routing]
    # May a later token change an earlier output, where a dispatcher drops?
    sees_future: bool
    # And with every dispatcher?
    always: bool
    # It ranks first choices before second ones, so with one choice a token it changes nothing.
    by_choice: bool = False


def choice_index(routing: Routing, num_tokens: int) -> jax.Array:
    """Returns which of its token's entries each entry is, counting from 0, [N]."""
    if routing.per_token:
        return jnp.arange(routing.token_N.shape[0], dtype=jnp.int32) % routing.per_token
    # Without a fixed number the entries of a token stand anywhere in the list.
    return rank_in(routing.token_N, num_tokens)[0]
