"""Tokens with large gates first (batch prioritized routing, V-MoE)."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.ordering.contract import Ordering, choice_index
from moe_jax.moe.routing.contract import Routing


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none."""


def apply(routing: Routing, *, num_tokens: int, **sizes) -> Routing:
    """Returns the routing with the tokens of a group in the order of their largest gate.

    Batch prioritized routing (V-MoE, Riquelme et al. 2021, arXiv:2106.05974, section 4.1). All
    first choices come before all second ones, as in the paper; tokens with equal gates by their
    place. The paper's gates are probabilities over all experts: for its order set
    `renormalize=False` where a router has that. Gates that sum to 1 rank a token by the share of
    its first choice among its k, and by nothing with k = 1.
    """
    del sizes
    gate_N = jax.lax.stop_gradient(routing.gate_N)
    no_gate_T = jnp.full_like(gate_N, -jnp.inf, shape=(num_tokens,))
    largest_gate_T = no_gate_T.at[routing.token_N].max(gate_N, mode="drop")
    # The rank is the inverse of the order.
    order_T = jnp.argsort(-largest_gate_T, stable=True)
    rank_T = jnp.argsort(order_T)
    # Of lexsort's keys the last decides first: the choice, then the token's rank.
    choice_N = choice_index(routing, num_tokens)
    order_N = jnp.lexsort((rank_T[routing.token_N], choice_N))
    return routing._replace(order_N=order_N.astype(jnp.int32))


ORDERING = Ordering(Options, apply, sees_future=True, always=False)
