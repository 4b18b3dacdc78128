"""Grouped-query self-attention, causal within a segment, with optional query-key norm and biases; and its key-value cache.

Heads are split over `model`, rows over `data` and `expert`. The core runs inside a shard_map because its CPU kernel loops over heads and
blocks, which global-view code may not do over a sharded dimension.

Shapes: B rows, S sequence, D model, H query heads, G key-value heads, A head width, M length of the cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.mesh import BATCH, P
from moe_jax.models.attention_core import attention, decode_attention
from moe_jax.models.layers import gather, rms_norm, rope, rotate
from moe_jax.weights import Weight, Weights


class Cache(NamedTuple):
    """Keys and values of the tokens so far; slot i of a row holds the token at position i. An argument and a return, never a variable."""

    k_BMGA: Any  # arrays; or their specs
    v_BMGA: Any


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
        weights |= {f"{name}_bias": Weight((n, a), ("heads", None), 0.0) for name, n in (("q", h), ("k", g), ("v", g))}
    if cfg.qk_norm:
        weights |= {f"{name}_norm_scale": Weight((a,), (None,), 0.0, 1.0) for name in ("q", "k")}
    return weights


class Attention(nnx.Module):
    """`attention(x_BSD, segment_BS, position_BS) -> (y_BSD, None)`, or with a cache `-> (y_BSD, cache)`.

    `seen_BM` (with a cache only): which of its slots hold a key; None = all up to the query's own.
    """

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        self.cfg = cfg
        self.weights = Weights(key, declare(cfg), cfg.param_dtype)

    def __call__(
        self,
        x_BSD: jax.Array,
        segment_BS: jax.Array,
        position_BS: jax.Array,
        cache: Cache | None = None,
        seen_BM: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        cfg, declared = self.cfg, declare(self.cfg)
        cos, sin = rope(position_BS, cfg.head_dim, cfg.rope_theta, cfg.dtype)
        q, k, v = (self._project(name, x_BSD) for name in ("q", "k", "v"))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        with jax.named_scope("attention"):
            if cache is None:
                o = _sharded_core(q, k, v, segment_BS, cfg.head_dim**-0.5)
            else:
                o, cache = _cached_core(q, k, v, position_BS, cache, seen_BM, cfg.head_dim**-0.5)
        w_o = gather(self.weights["o"], declared["o"].names, cfg.dtype)
        return jnp.einsum("BSHA,HAD->BSD", o, w_o, out_sharding=P(BATCH, None, None)), cache

    def _project(self, name: str, x_BSD: jax.Array) -> jax.Array:
        cfg = self.cfg
        y = jnp.einsum("BSD,DHA->BSHA", x_BSD, gather(self.weights[name], ("embed", "heads", None), cfg.dtype))
        if cfg.attention_bias:
            y = y + self.weights[f"{name}_bias"].astype(cfg.dtype)[None, None]
        if cfg.qk_norm and name != "v":
            y = rms_norm(y, self.weights[f"{name}_norm_scale"], cfg.norm_epsilon)
        return y


def _sharded_core(q, k, v, segment_BS, scale: float) -> jax.Array:
    heads = P(BATCH, None, "model", None)
    run = jax.shard_map(
        lambda *args: attention(*args, scale=scale), in_specs=(heads, heads, heads, P(BATCH, None)), out_specs=heads
    )
    return run(q, k, v, segment_BS)


def _cached_core(q, k, v, position_BS, cache: Cache, seen_BM, scale: float) -> tuple[jax.Array, Cache]:
    """Writes the new keys and values at their positions, then attends to all positions up to each query's own (that `seen_BM` allows)."""

    def on_device(q, k, v, position_BS, cache, seen_BM):
        row = jnp.arange(q.shape[0])[:, None]
        k_BMGA = cache.k_BMGA.at[row, position_BS].set(k, mode="drop")
        v_BMGA = cache.v_BMGA.at[row, position_BS].set(v, mode="drop")
        mask_BSM = jnp.arange(k_BMGA.shape[1])[None, None, :] <= position_BS[:, :, None]
        mask_BSM = mask_BSM if seen_BM is None else mask_BSM & seen_BM[:, None, :]
        return decode_attention(q, k_BMGA, v_BMGA, mask_BSM, scale=scale), Cache(k_BMGA, v_BMGA)

    heads = P(BATCH, None, "model", None)
    specs = (heads, heads, heads, P(BATCH, None), Cache(heads, heads), P(BATCH, None))
    run = jax.shard_map(on_device, in_specs=specs, out_specs=(heads, Cache(heads, heads)))
    return run(q, k, v, position_BS, cache, seen_BM)
