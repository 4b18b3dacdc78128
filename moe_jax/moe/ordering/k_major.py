"""All first choices of a group before all second ones (GShard)."""

import dataclasses

import jax.numpy as jnp

from moe_jax.moe.ordering.contract import Ordering, choice_index
from moe_jax.moe.routing.contract import Routing


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def apply(routing: Routing, *, num_tokens: int, **sizes) -> Routing:
    """Returns the routing with all first choices of a group before all second ones.

    That is the order of GShard (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1).
    """
    del sizes
    # One order for all groups: only the order inside a group matters to a dispatcher.
    choice_N = choice_index(routing, num_tokens)
    order_N = jnp.argsort(choice_N, stable=True).astype(jnp.int32)
    return routing._replace(order_N=order_N)


ORDERING = Ordering(Options, apply, sees_future=True, always=False, by_choice=True)
