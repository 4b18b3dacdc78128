"""What an attention is, and what attentions share.

The module that projects, turns, masks and writes back is models/attention.py. An attention says
which weights it has, which keys a token sees, in training and with a cache, and what that costs.

Masks, by name:

    causal    a token sees earlier ones of its segment, and itself
    full      a token sees its whole segment
    prefix    the tokens of a prefix see all of that; others are causal

Shapes: B rows, S sequence, D model, H query heads, G key-value heads, A head width, M slots of the
cache.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.models.attention_core import Keys
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.weights import Weight


class Cache(NamedTuple):
    """Keys and values of the tokens so far; slot i of a row holds the token at position i.

    An argument and a return, never a variable.
    """

    # Arrays, or their specs.
    k_BMGA: Any
    v_BMGA: Any


def no_advice(cfg: Config) -> Iterator[str]:
    """Advises nothing."""
    del cfg
    yield from ()


def small_already(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Changes nothing: no option depends on the length of a row."""
    del options, seq_len
    yield from ()


class Attention(NamedTuple):
    """All that there is to know of an attention; `ATTENTION` of its file."""

    # The frozen dataclass of its block in the config.
    options: type
    # (cfg) -> the weights by name: q, k, v, o, and those that `projections` tells of.
    weights: Callable[[ModelConfig], dict[str, Weight]]
    # The masks that it can have.
    masks: tuple[str, ...]
    # (mask, segment_BS, prefix_BS, options) -> the keys that each token of whole rows sees.
    keys: Callable[[str, Array, Array | None, Any], Keys]
    # With the mask "causal", may a later token change an earlier output?
    sees_future: bool
    # (cfg, number of rows, number of slots) -> a cache that holds no token.
    cache: Callable[[ModelConfig, int, int], Cache]
    # (position_BS, last_BS, number of slots, options) -> the slots that each token sees [B, S, M].
    # Its last one is its own position, or the end of the prefix that it belongs to.
    slots: Callable[[Array, Array, int, Any], Array]
    # (number of tokens, options) -> how many keys all tokens of one causal row see together.
    num_pairs: Callable[[int, Any], int]
    # Yields what is wrong with its options and the heads together.
    refusals: Callable[[Config], Iterator[str]]
    # Yields what a run is told at its start.
    advice: Callable[[Config], Iterator[str]] = no_advice
    # (raw options, seq_len) -> keys and values that suit rows of that length, which are short.
    small: Callable[[Mapping[str, Any], int], Iterator[tuple[str, Any]]] = small_already


def projections(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the weights of queries, keys, values and output, with biases and norms where the
    config has them.
    """
    d, h, g, a = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    # Each block writes to the residual stream twice. Weights are also asked for where there is no
    # block, to be counted.
    num_blocks = max(len(cfg.blocks), 1)
    out_std = (h * a) ** -0.5 * (2 * num_blocks) ** -0.5
    weights = {
        "q": Weight((d, h, a), ("embed", "heads", None), d**-0.5),
        "k": Weight((d, g, a), ("embed", "heads", None), d**-0.5),
        "v": Weight((d, g, a), ("embed", "heads", None), d**-0.5),
        "o": Weight((h, a, d), ("heads", None, "embed"), out_std),
    }
    if cfg.attention_bias:
        for name, num_heads in (("q", h), ("k", g), ("v", g)):
            weights[f"{name}_bias"] = Weight((num_heads, a), ("heads", None), 0.0)
    if cfg.output_bias:
        weights["o_bias"] = Weight((d,), (None,), 0.0)
    if cfg.qk_norm:
        for name, num_heads in (("q", h), ("k", g)):
            weights[f"{name}_norm_scale"] = _score_norm(num_heads, cfg)
    return weights


def _score_norm(num_heads: int, cfg: ModelConfig) -> Weight:
    """Returns the scale of the norm of queries or keys: one for all heads [A], or each its own."""
    if cfg.qk_norm_over == "head":
        return Weight((cfg.head_dim,), (None,), 0.0, 1.0)
    return Weight((num_heads, cfg.head_dim), ("heads", None), 0.0, 1.0)


def cache(cfg: ModelConfig, num_rows: int, num_slots: int) -> Cache:
    """Returns a cache of `num_slots` positions a row, on the current mesh."""

    shape = (num_rows, num_slots, cfg.num_kv_heads, cfg.head_dim)

    def zeros():
        return jax.sharding.reshard(jnp.zeros(shape, cfg.dtype), P(BATCH, None, "model"))

    # Two arrays: both are given up to the program that writes into them.
    return Cache(zeros(), zeros())


def head_refusals(cfg: Config) -> Iterator[str]:
    """Query heads share key heads evenly, and rotary embeddings turn pairs."""
    m = cfg.model
    if m.num_heads % m.num_kv_heads:
        yield (
            f"model.num_heads ({m.num_heads}) must be divisible by model.num_kv_heads "
            f"({m.num_kv_heads})"
        )
    if m.head_dim % 2:
        yield f"model.head_dim ({m.head_dim}) must be even: rotary embeddings turn pairs"
