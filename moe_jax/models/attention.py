"""Grouped-query attention within a segment, with optional query-key norm and biases, and its
key-value cache; and cross-attention.

Which keys a token sees is the mask (MASKS): earlier ones, or all of its segment; where there is a
prefix, all of that and earlier ones. Cross-attention sees the whole source row. It has no rotary
embedding: positions of two languages are not on one axis, and T5 (Raffel et al. 2020,
arXiv:1910.10683) and Marian have no position in it either; queries and keys know their places from
self-attention.

Heads are split over `model`, rows over `data` and `expert`. The core runs inside a shard_map
because its CPU kernel loops over heads and blocks, which global-view code may not do over a sharded
dimension.

Shapes: B rows, S sequence, T tokens of a source row, D model, H query heads, G key-value heads, A
head width, M length of the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.models.attention_core import (
    Keys,
    across,
    attention,
    causal,
    decode_attention,
    full,
    prefix,
)
from moe_jax.models.layers import gather, rms_norm, rope, rotate
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weight, Weights

MASKS: dict[str, Callable[..., Keys]] = {"causal": causal, "full": full}


class Cache(NamedTuple):
    """Keys and values of the tokens so far; slot i of a row holds the token at position i.

    An argument and a return, never a variable.
    """

    k_BMGA: Any  # arrays; or their specs
    v_BMGA: Any


class Memory(NamedTuple):
    """Keys and values of the source rows for the cross-attention of one block: constant while the
    target is decoded.
    """

    k_BTGA: Any
    v_BTGA: Any
    segment_BT: Any  # 0 = padding


def declare(cfg: ModelConfig) -> dict[str, Weight]:
    d, h, g, a = cfg.d_model, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    out_std = (h * a) ** -0.5 * (2 * len(cfg.blocks)) ** -0.5
    weights = {
        "q": Weight((d, h, a), ("embed", "heads", None), d**-0.5),
        "k": Weight((d, g, a), ("embed", "heads", None), d**-0.5),
        "v": Weight((d, g, a), ("embed", "heads", None), d**-0.5),
        "o": Weight((h, a, d), ("heads", None, "embed"), out_std),
    }
    if cfg.attention_bias:
        weights |= {
            f"{name}_bias": Weight((n, a), ("heads", None), 0.0)
            for name, n in (("q", h), ("k", g), ("v", g))
        }
    if cfg.qk_norm:
        weights |= {f"{name}_norm_scale": Weight((a,), (None,), 0.0, 1.0) for name in ("q", "k")}
    return weights


class Attention(nnx.Module):
    """`attention(x_BSD, segment_BS, position_BS) -> (y_BSD, None)`, or with a cache `-> (y_BSD,
    cache)`.

    `seen_BM` (with a cache only): which of its slots hold a key; None = all up to the query's own.
    `prefix_BS`: which tokens see their whole prefix instead; with a cache all of a row's prefix
    comes in one call.
    """

    def __init__(self, key: jax.Array, cfg: ModelConfig, mask: str = "causal"):
        self.cfg, self.mask = cfg, mask
        self.weights = Weights(key, declare(cfg), cfg.param_dtype)

    def __call__(
        self,
        x_BSD: jax.Array,
        segment_BS: jax.Array,
        position_BS: jax.Array,
        cache: Cache | None = None,
        seen_BM: jax.Array | None = None,
        prefix_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.cfg
        cos, sin = rope(position_BS, cfg.head_dim, cfg.rope_theta, cfg.dtype)
        q, k, v = (project(self.weights, name, x_BSD, cfg) for name in ("q", "k", "v"))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        with jax.named_scope("attention"):
            if cache is None:
                keys, about = MASKS[self.mask], (segment_BS,)
                if prefix_BS is not None:
                    keys, about = prefix, (segment_BS, prefix_BS)
                o = _sharded_core(q, k, v, keys, about, cfg.head_dim**-0.5)
            else:
                last_BS = position_BS if prefix_BS is None else _last_seen(position_BS, prefix_BS)
                o, cache = _cached_core(
                    q, k, v, position_BS, last_BS, cache, seen_BM, cfg.head_dim**-0.5
                )
        return write(self.weights, o, cfg), cache


class CrossAttention(nnx.Module):
    """`cross(x_BSD, segment_BS, memory) -> y_BSD`, where `memory = cross.remember(source_BTD,
    segment_BT)`.
    """

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        self.cfg = cfg
        self.weights = Weights(key, declare(cfg), cfg.param_dtype)

    def remember(self, source_BTD: jax.Array, segment_BT: jax.Array) -> Memory:
        k, v = (project(self.weights, name, source_BTD, self.cfg) for name in ("k", "v"))
        return Memory(k, v, segment_BT)

    def __call__(self, x_BSD: jax.Array, segment_BS: jax.Array, memory: Memory) -> jax.Array:
        q = project(self.weights, "q", x_BSD, self.cfg)
        with jax.named_scope("cross_attention"):
            about = (segment_BS, memory.segment_BT)
            o = _sharded_core(
                q, memory.k_BTGA, memory.v_BTGA, across, about, self.cfg.head_dim**-0.5
            )
        return write(self.weights, o, self.cfg)


def project(weights: Weights, name: str, x_BSD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Queries, keys or values [B, S, H or G, A] of x."""
    y = jnp.einsum(
        "BSD,DHA->BSHA", x_BSD, gather(weights[name], ("embed", "heads", None), cfg.dtype)
    )
    if cfg.attention_bias:
        y = y + weights[f"{name}_bias"].astype(cfg.dtype)[None, None]
    if cfg.qk_norm and name != "v":
        y = rms_norm(y, weights[f"{name}_norm_scale"], cfg.norm_epsilon)
    return y


def write(weights: Weights, o_BSHA: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Returns what the heads add to the residual stream."""
    w_o = gather(weights["o"], ("heads", None, "embed"), cfg.dtype)
    return jnp.einsum("BSHA,HAD->BSD", o_BSHA, w_o, out_sharding=P(BATCH, None, None))


def _last_seen(position_BS: jax.Array, prefix_BS: jax.Array) -> jax.Array:
    """The last slot that each token sees: of the whole prefix for its tokens, else its own."""
    end_B1 = jnp.where(prefix_BS, position_BS, 0).max(1, keepdims=True)
    return jnp.where(prefix_BS, end_B1, position_BS)


def _sharded_core(
    q, k, v, keys: Callable[..., Keys], about: tuple[jax.Array, ...], scale: float
) -> jax.Array:
    """`keys(*about)`: which keys each query sees."""
    heads = P(BATCH, None, "model", None)
    run = jax.shard_map(
        lambda q, k, v, about: attention(q, k, v, keys(*about), scale=scale),
        in_specs=(heads, heads, heads, P(BATCH, None)),
        out_specs=heads,
    )
    return run(q, k, v, about)


def _cached_core(
    q, k, v, position_BS, last_BS, cache: Cache, seen_BM, scale: float
) -> tuple[jax.Array, Cache]:
    """Writes the new keys and values at their positions, then attends to all positions up to each
    query's last (that `seen_BM` allows).
    """

    def on_device(q, k, v, position_BS, last_BS, cache, seen_BM):
        row = jnp.arange(q.shape[0])[:, None]
        k_BMGA = cache.k_BMGA.at[row, position_BS].set(k, mode="drop")
        v_BMGA = cache.v_BMGA.at[row, position_BS].set(v, mode="drop")
        mask_BSM = jnp.arange(k_BMGA.shape[1])[None, None, :] <= last_BS[:, :, None]
        mask_BSM = mask_BSM if seen_BM is None else mask_BSM & seen_BM[:, None, :]
        return decode_attention(q, k_BMGA, v_BMGA, mask_BSM, scale=scale), Cache(k_BMGA, v_BMGA)

    heads = P(BATCH, None, "model", None)
    specs = (
        heads,
        heads,
        heads,
        P(BATCH, None),
        P(BATCH, None),
        Cache(heads, heads),
        P(BATCH, None),
    )
    run = jax.shard_map(on_device, in_specs=specs, out_specs=(heads, Cache(heads, heads)))
    return run(q, k, v, position_BS, last_BS, cache, seen_BM)
