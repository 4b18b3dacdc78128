"""Random experts: a baseline that learns nothing. What is routing by content worth?

A token takes k distinct experts, a pure function of (option seed, layer, position, token id), each
with the gate 1 / k. Every expert is equally likely, so loads are even on average. The row is
deliberately not in it: which row a document lies in is an accident of the batch, and a row that is
decoded alone must route as it did in training. For the same reason nothing is drawn from the step's
rng, which changes from step to step and does not exist at decoding. Equal tokens at equal positions
of two documents go to the same experts. The layer enters through `salt`, a number that each layer
draws once, keeps as router state and so saves in the checkpoint.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Sizes,
    Tokens,
    by_number,
    no_weights,
    sees_nothing,
)
from moe_jax.moe.routing.statistics import even_routing
from moe_jax.schema.options import NUMBER, SEED, option
from moe_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(2, "experts per token", NUMBER)
    seed: int = option(0, "of the random draw", SEED)


def salt(sizes: Sizes, options: Options) -> dict[str, Weight]:
    """Declares one number per layer, drawn at the start and never changed."""
    del sizes, options
    return {"salt": Weight((), (), 1.0)}


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns k distinct experts by position and token id."""
    del params, rng, train
    # fold_in takes an integer, and the bits of a float are one.
    salt_bits = jax.lax.bitcast_convert_type(state["salt"].astype(jnp.float32), jnp.uint32)
    layer_key = jax.random.fold_in(jax.random.key(cfg.options.seed), salt_bits)

    def draw(position: jax.Array, token_id: jax.Array) -> jax.Array:
        token_key = jax.random.fold_in(jax.random.fold_in(layer_key, position), token_id)
        # The experts with the k largest of E random numbers are distinct, and all equally likely.
        bits_E = jax.random.bits(token_key, (cfg.num_experts,))
        _, expert_index_K = jax.lax.top_k(bits_E, cfg.options.k)
        return expert_index_K

    expert_index_TK = jax.vmap(draw)(tokens.position_T, tokens.id_T)
    return even_routing(expert_index_TK, tokens, cfg)


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=True, gate_sum=1.0)


ROUTER = Router(
    Options, route, sees_nothing, declared, params=no_weights, state=salt, renumbered=by_number
)
