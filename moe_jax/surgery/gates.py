"""What a router gives to experts: its gates on random tokens, in float64.

So every router is asked itself whether copies of one network weigh as much as the network.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Arrays, RouterCfg, Routing, Slots, Tokens
from moe_jax.schema.config import ModelConfig

# Of the random tokens.
ROWS, LENGTH = 4, 64
# Gates that differ by less are the same: a few hundred roundings.
SAME = 1e-11


def measured(cfg: ModelConfig, params: Arrays, state: Arrays, seed: int = 0) -> np.ndarray:
    """Returns the gates [T, E] of random tokens at evaluation, 0 where an expert has not the token.

    For a router that mixes tokens into slots, what of each expert a token reads.
    """
    moe, num_tokens = cfg.moe, ROWS * LENGTH
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        # The gates of two tokens are compared, so tokens differ in all that a router may read.
        tokens = Tokens(
            x_TD=jnp.asarray(rng.normal(size=(num_tokens, cfg.d_model))),
            id_T=jnp.asarray(rng.integers(0, cfg.vocab_size, num_tokens), jnp.int32),
            position_T=jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), ROWS),
            row_T=jnp.repeat(jnp.arange(ROWS, dtype=jnp.int32), LENGTH),
            segment_T=jnp.ones(num_tokens, jnp.int32),
            valid_T=jnp.ones(num_tokens, bool),
            num_rows=ROWS,
        )
        router_cfg = RouterCfg(
            moe.num_experts, moe.router_options, 1, cfg.vocab_size, total=_one_device
        )

        # The tokens are constants of the program: their number of rows decides shapes.
        @jax.jit
        def run(params: Arrays, state: Arrays) -> jax.Array:
            chosen = ROUTERS[moe.router].route(
                params, state, tokens, cfg=router_cfg, rng=jax.random.key(0), train=False
            )
            return _by_expert(chosen, num_tokens, moe.num_experts)

        return np.asarray(run(_wide(params), _wide(state)))


def _one_device(x: jax.Array) -> jax.Array:
    return x


def _wide(arrays: Arrays) -> Arrays:
    return {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}


def _by_expert(chosen: Routing | Slots, num_tokens: int, num_experts: int) -> jax.Array:
    """Returns gates [T, E] from a list of assignments, or from slots."""
    if isinstance(chosen, Slots):
        return chosen.combine_GtEp.sum(3).reshape(num_tokens, num_experts)
    # The last column is of what goes nowhere.
    empty = jnp.zeros((num_tokens, num_experts + 1), chosen.gate_N.dtype)
    filled = empty.at[chosen.token_N, chosen.expert_index_N].add(chosen.gate_N)
    return filled[:, :num_experts]


def mixes(cfg: ModelConfig) -> bool:
    """Returns whether experts work on mixtures of tokens."""
    return ROUTERS[cfg.moe.router].num_slots(cfg.moe.router_options) > 0


def constant(x: np.ndarray) -> float | None:
    """Returns the one number that an array holds, up to rounding; None where it holds others."""
    middle = float(x.mean())
    # Relative to the mean; one of 0 has no size.
    is_same = np.abs(x - middle).max() <= SAME * max(abs(middle), 1e-30)
    return middle if is_same and middle > 0 else None
