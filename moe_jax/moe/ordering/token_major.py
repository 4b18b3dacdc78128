"""Token by token, as the router lists assignments: the ordering of causal models."""

import dataclasses

from moe_jax.moe.ordering.contract import Ordering
from moe_jax.moe.routing.contract import Routing


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def apply(routing: Routing, **sizes) -> Routing:
    """Returns the routing as it is: token by token, a token's choices in order of falling gate.

    Causal: later tokens never win over earlier.
    """
    del sizes
    return routing


ORDERING = Ordering(Options, apply, sees_future=False, always=False)
