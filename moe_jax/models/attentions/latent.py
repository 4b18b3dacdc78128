"""Multi-head latent attention: keys and values of all heads are made of one short vector of a
token, which is all that a cache keeps (DeepSeek-V2, Liu et al. 2024, arXiv:2405.04434, section 2.1,
eq. 9-19, and appendix C).

    c_Q = norm(x W_QA)            queries' latent; q_lora_rank = 0: there is none, q = x W_Q
    q = c_Q W_QB                  each head: qk_nope_head_dim numbers, and qk_rope_head_dim that
                                  turn
    c, k_R = x W_KVA              the latent of keys and values, and a key that turns, of all heads
    k_h, v_h = norm(c) W_KVB      each head
    score = (q_nope . k_h + q_rope . k_R) scale

Only q_rope and k_R know their positions. So in decoding W_KVB need not be applied to what the cache
keeps: with W_KVB = (W_K, W_V), q_nope . (c W_K) = (q_nope W_K^T) . c, and a weighted sum of all c
W_V is W_V times the weighted sum of all c. Decoding is then attention of all heads to one key of
width kv_lora_rank + qk_rope_head_dim, whose first part is the value ("absorbed"). The cache of a
token has so many numbers, whatever the number of heads.

With `mscale` scores are multiplied by (0.1 mscale log(factor) + 1)^2, where the rotary scaling has
a `factor` (YaRN, arXiv:2309.00071, section 3.4; the released code of DeepSeek-V2, mscale_all_dim).

Shapes: B rows, S sequence, D model, H heads, Q and R ranks of the latents of queries and of keys, N
numbers of a head that do not turn, T numbers that turn, V width of a value, M slots.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.models.attentions import grouped_query, heads
from moe_jax.models.attentions.contract import Attention, Caching
from moe_jax.models.layers import gather, linear, rms_norm, scale_of_norm
from moe_jax.parallel import context
from moe_jax.parallel.mesh import BATCH, RANK, P
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.schema.options import (
    COUNT,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    at_least,
    option,
    typed_options,
)
from moe_jax.weights import Weight, Weights

ROW = P(BATCH, None, None)


@dataclasses.dataclass(frozen=True)
class Options:
    q_lora_rank: int = option(0, "width of the latent of queries; 0 = there is none", COUNT)
    kv_lora_rank: int = option(64, "width of the latent of keys and values", NUMBER)
    qk_nope_head_dim: int = option(16, "numbers of a query and a key that do not turn", NUMBER)
    qk_rope_head_dim: int = option(8, "numbers that turn; the key's are of all heads", at_least(2))
    v_head_dim: int = option(16, "numbers of a value", NUMBER)
    norm_epsilon: float = option(1e-6, "of the norms of both latents", POSITIVE)
    mscale: float = option(
        0.0,
        "> 0: scores times (0.1 mscale log(factor of the rotary scaling) + 1)^2 (mscale_all_dim)",
        NOT_NEGATIVE,
    )


class Cache(NamedTuple):
    """Holds what all heads read of the tokens so far: arrays, or their specs."""

    latent_BMR: Any
    key_BMT: Any

    @property
    def num_slots(self) -> int:
        return self.key_BMT.shape[1]


def options_of(cfg: ModelConfig) -> Options:
    """Returns the options of this attention in a config that has chosen it."""
    return typed_options(Options, cfg.attention_options)


def weights(cfg: ModelConfig) -> dict[str, Weight]:
    """Returns the weights; biases are of the projections of x, and of the output."""
    own, d, h = options_of(cfg), cfg.d_model, cfg.num_heads
    q_width = own.qk_nope_head_dim + own.qk_rope_head_dim
    rank, kv_width = own.kv_lora_rank, own.qk_nope_head_dim + own.v_head_dim
    declared = {}
    # Queries of all heads, through their latent or from x.
    if own.q_lora_rank:
        q_rank = own.q_lora_rank
        declared["q_a"] = Weight((d, q_rank), ("embed", None), d**-0.5)
        declared["q_a_norm_scale"] = scale_of_norm((q_rank,), (None,), cfg)
        declared["q_b"] = Weight((q_rank, h, q_width), (RANK, "heads", None), q_rank**-0.5)
    else:
        declared["q"] = Weight((d, h, q_width), ("embed", "heads", None), d**-0.5)
    # The latent of keys and values, and beside it the key that turns. All heads have the same, so
    # the axis "model" does not split them.
    declared["kv_a"] = Weight((d, rank + own.qk_rope_head_dim), ("embed", None), d**-0.5)
    declared["kv_a_norm_scale"] = scale_of_norm((rank,), (None,), cfg)
    # W_K and W_V of each head, side by side.
    declared["kv_b"] = Weight((rank, h, kv_width), (RANK, "heads", None), rank**-0.5)
    if cfg.attention_bias:
        if own.q_lora_rank:
            declared["q_a_bias"] = Weight((own.q_lora_rank,), (None,), 0.0)
        declared["kv_a_bias"] = Weight((rank + own.qk_rope_head_dim,), (None,), 0.0)
    return declared | heads.output(cfg, own.v_head_dim) | heads.sinks(cfg)


def scale(cfg: ModelConfig) -> float:
    """Returns the factor on the scores."""
    own = options_of(cfg)
    factor = getattr(cfg.rope_scaling_options, "factor", 1.0)
    # Longer rows flatten the softmax; this sharpens it again. It is 1 without mscale.
    sharper = 0.1 * own.mscale * math.log(factor) + 1
    width = own.qk_nope_head_dim + own.qk_rope_head_dim
    return (cfg.attention_scale or width**-0.5) * sharper**2


def widths(cfg: ModelConfig) -> tuple[int, int]:
    """Returns the widths of a key and of a value."""
    own = options_of(cfg)
    return own.qk_nope_head_dim + own.qk_rope_head_dim, own.v_head_dim


def key_heads(cfg: ModelConfig) -> int:
    """Returns that each head has keys and values of its own."""
    return cfg.num_heads


def queries(weights: Weights, x_BSD: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """Returns (what does not turn [B, S, H, N], what turns [B, S, H, T], not turned yet)."""
    own = options_of(cfg)
    if own.q_lora_rank:
        latent_BSQ = _down(weights, "q_a", x_BSD, cfg)
        latent_BSQ = _norm(latent_BSQ, weights["q_a_norm_scale"], cfg)
        w_QHA = gather(weights["q_b"], (RANK, "heads", None), cfg.dtype)
        q = _up(latent_BSQ, w_QHA, cfg)
    else:
        w_DHA = gather(weights["q"], ("embed", "heads", None), cfg.dtype)
        q = _up(x_BSD, w_DHA, cfg)
    return q[..., : own.qk_nope_head_dim], q[..., own.qk_nope_head_dim :]


def latents(weights: Weights, x_BSD: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """Returns (latent of keys and values [B, S, R], key of all heads [B, S, T], not turned yet)."""
    own = options_of(cfg)
    both = _down(weights, "kv_a", x_BSD, cfg)
    latent_BSR, key_BST = both[..., : own.kv_lora_rank], both[..., own.kv_lora_rank :]
    return _norm(latent_BSR, weights["kv_a_norm_scale"], cfg), key_BST


def _norm(latent_BSR: Array, scale_R: Array, cfg: ModelConfig) -> Array:
    """Returns a latent that is normalised, with an epsilon of its own."""
    return rms_norm(latent_BSR, scale_R, options_of(cfg).norm_epsilon, cfg.norm_plus_one)


def _down(weights: Weights, name: str, x_BSD: Array, cfg: ModelConfig) -> Array:
    """Returns a projection of x that is the same for all heads."""
    w_DQ = gather(weights[name], ("embed", None), cfg.dtype)
    y_BSQ = jnp.einsum("BSD,DQ->BSQ", x_BSD, w_DQ)
    if cfg.attention_bias:
        y_BSQ = y_BSQ + weights[f"{name}_bias"].astype(cfg.dtype)[None, None]
    return y_BSQ


def _up(x_BSQ: Array, w_QHA: Array, cfg: ModelConfig) -> Array:
    """Returns a projection to the heads [B, S, H, A]."""
    with jax.named_scope("in_projection"):
        return linear(x_BSQ, w_QHA, cfg.dtype)


def up_projections(weights: Weights, cfg: ModelConfig) -> tuple[Array, Array]:
    """Returns (W_K [R, H, N], W_V [R, H, V])."""
    w_RHA = gather(weights["kv_b"], (RANK, "heads", None), cfg.dtype)
    num_nope = options_of(cfg).qk_nope_head_dim
    return w_RHA[..., :num_nope], w_RHA[..., num_nope:]


def _turned(q_BSHT: Array, key_BST: Array, position_BS: Array, cfg: ModelConfig) -> Any:
    """Returns (queries, keys [B, S, 1, T]) turned by their positions."""
    cos, sin = heads.angles(position_BS, cfg, options_of(cfg).qk_rope_head_dim)
    key_BS1T = key_BST[:, :, None]
    return heads.turned(q_BSHT, cos, sin, cfg), heads.turned(key_BS1T, cos, sin, cfg)


def inputs(
    weights: Weights, x_BSD: Array, position_BS: Array, cfg: ModelConfig
) -> tuple[Array, Array, Array]:
    """Returns (queries, keys, values) of whole rows, each head its own."""
    q_BSHN, q_BSHT = queries(weights, x_BSD, cfg)
    latent_BSR, key_BST = latents(weights, x_BSD, cfg)
    q_BSHT, key_BS1T = _turned(q_BSHT, key_BST, position_BS, cfg)
    w_k, w_v = up_projections(weights, cfg)
    k_BSHN = _up(latent_BSR, w_k, cfg)
    v_BSHV = _up(latent_BSR, w_v, cfg)
    # The key that turns is one for all heads; kernels want one for each.
    key_BSHT = jnp.broadcast_to(key_BS1T, (*k_BSHN.shape[:3], key_BS1T.shape[3]))
    # Every device of `model` has the key of all heads, and needs it for its own.
    of_heads = context.tokens_spec(x_BSD, "model", None)
    key_BSHT = jax.sharding.reshard(key_BSHT, of_heads)
    q = jnp.concatenate([q_BSHN, q_BSHT], axis=-1)
    return q, jnp.concatenate([k_BSHN, key_BSHT], axis=-1), v_BSHV


def empty_cache(cfg: ModelConfig, num_rows: int, num_slots: int) -> Cache:
    """Returns a cache of `num_slots` positions a row, on the current mesh."""
    own = options_of(cfg)

    def zeros(width: int) -> Array:
        return jax.sharding.reshard(jnp.zeros((num_rows, num_slots, width), cfg.dtype), ROW)

    return Cache(zeros(own.kv_lora_rank), zeros(own.qk_rope_head_dim))


def cached_inputs(
    weights: Weights, x_BSD: Array, position_BS: Array, cfg: ModelConfig
) -> tuple[Array, Cache]:
    """Returns (queries that W_K went into [B, S, H, R + T], what the cache keeps of the tokens)."""
    q_BSHN, q_BSHT = queries(weights, x_BSD, cfg)
    latent_BSR, key_BST = latents(weights, x_BSD, cfg)
    q_BSHT, key_BS1T = _turned(q_BSHT, key_BST, position_BS, cfg)
    w_k, _ = up_projections(weights, cfg)
    # q_nope . (c W_K) = (q_nope W_K^T) . c: the query is scored against the latent itself.
    q_BSHR = jnp.einsum("BSHN,RHN->BSHR", q_BSHN, w_k)
    return jnp.concatenate([q_BSHR, q_BSHT], axis=-1), Cache(latent_BSR, key_BS1T[:, :, 0])


def keys_and_values(cache: Cache) -> tuple[Array, Array]:
    """Returns (keys [B, 1, R + T, M], values [B, 1, M, R]) of all heads."""
    key_BMU = jnp.concatenate([cache.latent_BMR, cache.key_BMT], axis=-1)
    # All heads read one key, whose first part is the value.
    return key_BMU.mT[:, None], cache.latent_BMR[:, None]


def outputs(weights: Weights, o_BSHR: Array, cfg: ModelConfig) -> Array:
    """Returns what the heads read [B, S, H, V], from weighted sums of latents."""
    _, w_v = up_projections(weights, cfg)
    # A weighted sum of all c W_V is W_V times the weighted sum of all c.
    return jnp.einsum("BSHR,RHV->BSHV", o_BSHR, w_v)


def num_pairs(num_tokens: int, options: Options) -> int:
    """Returns 1 + 2 + .. + n: the token at place i sees i + 1 keys."""
    del options
    return num_tokens * (num_tokens + 1) // 2


def refusals(cfg: Config, name: str) -> Iterator[str]:
    """Refuses options of ordinary heads, which would do nothing, and an odd width that turns."""
    m, own = cfg.model, options_of(cfg.model.with_attention(name))
    at = f"model.attentions.{name}"
    # What the options refuse by themselves.
    if own.qk_rope_head_dim % 2:
        yield (
            f"{at}.qk_rope_head_dim ({own.qk_rope_head_dim}) must be even: rotary embeddings turn "
            "pairs"
        )
    if own.mscale and not hasattr(m.rope_scaling_options, "factor"):
        yield (
            f"{at}.mscale = {own.mscale} does nothing, because model.rope_scaling = "
            f'"{m.rope_scaling}" has no factor: set it to 0'
        )
    # Keys of ordinary heads, which this attention does not read. Where other blocks have such heads
    # the keys are theirs.
    if set(m.attentions) != {name}:
        return
    if m.num_kv_heads != m.num_heads:
        yield (
            f"model.num_kv_heads ({m.num_kv_heads}) must be model.num_heads ({m.num_heads}) with "
            'model.attention = "latent", in which each head has its own keys'
        )
    if m.head_dim != max(m.d_model // m.num_heads, 1):
        yield (
            f'model.head_dim ({m.head_dim}) does nothing, because model.attention = "latent" has '
            f"{at}.qk_nope_head_dim, qk_rope_head_dim and v_head_dim: leave the key alone"
        )
    for key, neutral in (("qk_norm", False), ("rope_fraction", 1.0)):
        if getattr(m, key) != neutral:
            yield (
                f"model.{key} = {getattr(m, key)} does nothing, because model.attention = "
                '"latent" has no ordinary heads: leave the key alone'
            )


def small(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Yields widths of a small model."""
    del seq_len
    # Different numbers, so that a mistaken dimension is found.
    bounds = {"q_lora_rank": 6, "kv_lora_rank": 4, "qk_nope_head_dim": 2, "v_head_dim": 3}
    for name, bound in (bounds | {"qk_rope_head_dim": 2}).items():
        yield name, min(options[name], bound)


CACHING = Caching(
    empty_cache,
    Cache(ROW, ROW),
    Cache(ROW, ROW),
    Cache(-2, -2),
    cached_inputs,
    keys_and_values,
    outputs,
)
ATTENTION = Attention(
    Options,
    weights,
    inputs,
    scale,
    widths,
    ("causal", "full", "prefix"),
    grouped_query.keys,
    sees_future=False,
    caching=CACHING,
    slots=grouped_query.slots,
    num_pairs=num_pairs,
    refusals=refusals,
    key_heads=key_heads,
    small=small,
)
