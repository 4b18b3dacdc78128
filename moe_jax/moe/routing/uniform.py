"""Round robin: a baseline that learns nothing. What is routing by content worth?

A token at position p of its document takes the experts p k, p k + 1, .., p k + k - 1 modulo E, each
with the gate 1 / k. Any E / gcd(E, k) tokens in a row take every expert equally often, so in every
document (and every part of one) the loads of two experts differ by at most one.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Tokens,
    no_weights,
    sees_nothing,
    times_k,
)
from moe_jax.moe.routing.statistics import even_routing
from moe_jax.schema.options import NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "experts per token", NUMBER)


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns k experts in turn by position."""
    del params, state, rng, train
    k, num_experts = cfg.options.k, cfg.num_experts
    # The modulo comes first, which changes nothing and keeps the product small.
    position_T = tokens.position_T % num_experts
    choice_K = jnp.arange(k, dtype=position_T.dtype)
    expert_index_TK = (position_T[:, None] * k + choice_K[None]) % num_experts
    return even_routing(expert_index_TK, tokens, cfg)


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=True, gate_sum=1.0)


def renumbered(options: Options, index: Sequence[int], num_experts: int) -> str:
    """Returns why experts cannot get other numbers, unless each becomes several in a row."""
    del options
    n = len(index) // num_experts
    if n and list(index) == [old for old in range(num_experts) for _ in range(n)]:
        return ""
    return "it sends tokens to experts by their numbers, whatever they have learned"


ROUTER = Router(
    Options,
    route,
    sees_nothing,
    declared,
    params=no_weights,
    multiplied=times_k,
    renumbered=renumbered,
)
