"""Hash routing (Roller et al. 2021, arXiv:2106.04426, section 3): a fixed random table from token
ids to experts, nothing is learned.

    experts of a token = table[id], k distinct ones;  gates 1 / k

The table is drawn from the option `seed` alone, the same in every layer, and balanced over the
*vocabulary*: of its k V entries every expert has k V / E, give or take one (the paper's balanced
hash balances over the training set's frequencies instead, so here loads follow the frequencies of
the ids). Reads no activation, so it has no parameters and depends on nothing but the token itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.routing.contract import (
    Arrays,
    Declared,
    Router,
    RouterCfg,
    Routing,
    Tokens,
    by_number,
    no_weights,
    sees_nothing,
)
from moe_jax.moe.routing.statistics import even_routing
from moe_jax.schema.options import NUMBER, SEED, option


@dataclasses.dataclass(frozen=True)
class Options:
    k: int = option(1, "experts per token", NUMBER)
    seed: int = option(0, "of the random draw", SEED)


def route(
    params: Arrays, state: Arrays, tokens: Tokens, *, cfg: RouterCfg, rng: jax.Array, train: bool
) -> Routing:
    """Returns k assignments per token by its id.

    There are no logits: probabilities are uniform, and z is 0.
    """
    del params, state, rng, train
    options = cfg.options
    # The table is made on the host while the program is traced, and is a constant of it.
    table_VK = jnp.asarray(hash_table(cfg.vocab_size, cfg.num_experts, options.k, options.seed))
    expert_index_TK = table_VK.at[tokens.id_T].get()
    return even_routing(expert_index_TK, tokens, cfg)


@functools.lru_cache(maxsize=8)
def hash_table(vocab_size: int, num_experts: int, k: int, seed: int) -> np.ndarray:
    """Returns the k distinct experts of every id, int32 [V, k].

    The ids in random order are cut into blocks of E. Inside a block, id i takes the k entries from
    i k on of a random order of the experts, round and round, so a whole block gives k ids to every
    expert, and a part of one differs by at most one.
    """
    rng = np.random.default_rng(seed)
    # The i-th id of a random order stands in block i // E, at place i % E.
    id_V = rng.permutation(vocab_size)
    block_V, place_in_block_V = np.divmod(np.arange(vocab_size), num_experts)
    num_blocks = block_V[-1] + 1
    # A random order of the experts for each of the B blocks.
    sorted_BE = np.tile(np.arange(num_experts), (num_blocks, 1))
    shuffled_BE = rng.permuted(sorted_BE, axis=1)
    # The k turns of an id in the order of its block.
    turn_VK = (place_in_block_V[:, None] * k + np.arange(k)[None]) % num_experts
    table_VK = np.empty((vocab_size, k), np.int32)
    table_VK[id_V] = shuffled_BE[block_V[:, None], turn_VK]
    return table_VK


def declared(num_experts: int, options: Options) -> Declared:
    del num_experts
    return Declared(most=options.k, exact=True, gate_sum=1.0)


ROUTER = Router(Options, route, sees_nothing, declared, params=no_weights, renumbered=by_number)
