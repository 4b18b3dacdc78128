"""Baselines that learn nothing: what is routing by content worth? Both give every one of k experts
the gate 1 / k.

uniform: a token at position p of its document takes the experts p k, p k + 1, .., p k + k - 1
modulo E: round robin. Any E / gcd(E, k) tokens in a row take every expert equally often, so in
every document (and every part of one) the loads of two experts differ by at most one.

random: k distinct experts, a pure function of (option seed, layer, position, token id). Every
expert is equally likely, so loads are even on average. The row is deliberately not in it: which row
a document lies in is an accident of the batch, and a row that is decoded alone must route as it did
in training. For the same reason nothing is drawn from the step's rng, which changes from step to
step and does not exist at decoding. Equal tokens at equal positions of two documents go to the same
experts. The layer enters through `salt`, a number that each layer draws once, keeps as router state
and so saves in the checkpoint.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    RouterCfg,
    Routing,
    Sizes,
    Tokens,
    even,
)
from moe_jax.weights import Weight


def salt(sizes: Sizes, options: Mapping[str, Any]) -> dict[str, Weight]:
    """One number per layer, drawn at the start and never changed."""
    del sizes, options
    return {"salt": Weight((), (), 1.0)}


def route_uniform(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """k experts in turn by position."""
    del params, state, rng, train
    k = cfg.options["k"]
    first_T1 = (tokens.position_T % cfg.num_experts * k)[:, None]
    return even((first_T1 + jnp.arange(k)[None]) % cfg.num_experts, tokens, cfg)


def route_random(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """k distinct experts by position and token id."""
    del params, rng, train
    bits = jax.lax.bitcast_convert_type(state["salt"].astype(jnp.float32), jnp.uint32)
    key = jax.random.fold_in(jax.random.key(cfg.options["seed"]), bits)

    def draw(position: jax.Array, token: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, position), token)
        return jax.lax.top_k(jax.random.bits(own, (cfg.num_experts,)), cfg.options["k"])[1]

    return even(jax.vmap(draw)(tokens.position_T, tokens.id_T), tokens, cfg)


def declared(num_experts: int, options: Mapping[str, Any]) -> Declared:
    del num_experts
    return Declared(most=options["k"], exact=True, gate_sum=1.0)
