"""Self-attention within a segment, with optional query-key norm and biases, and its key-value
cache; and cross-attention.

Which attention it is (attentions/) says which keys a token sees. Cross-attention sees the whole
source row. It has no rotary embedding: positions of two languages are not on one axis, and T5
(Raffel et al. 2020, arXiv:1910.10683) and Marian have no position in it either; queries and keys
know their places from self-attention.

Heads are split over `model`, rows over `data` and `expert`. The core runs inside a shard_map
because its CPU kernel loops over heads and blocks, which global-view code may not do over a sharded
dimension.

Shapes: B rows, S sequence, T tokens of a source row, D model, H query heads, G key-value heads, A
head width, M slots of the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.models.attention_core import SPLASH, Keys, across, attention, decode_attention
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.attentions.contract import Cache, projections
from moe_jax.models.layers import gather, rms_norm, rope, rotate
from moe_jax.models.rope_scalings import ROPE_SCALINGS
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weights

# The mesh axes of queries, keys and values [B, S, H or G, A], and of what is known of tokens.
HEADS, TOKENS = P(BATCH, None, "model", None), P(BATCH, None)


class Memory(NamedTuple):
    """Keys and values of the source rows for the cross-attention of one block: constant while the
    target is decoded.
    """

    k_BTGA: Any
    v_BTGA: Any
    # 0 = padding.
    segment_BT: Any


class SelfAttention(nnx.Module):
    """`attend(x_BSD, segment_BS, position_BS, prefix_BS) -> y_BSD`, of whole rows;
    `attend.cached(x_BSD, position_BS, cache, prefix_BS, chosen_BM) -> (y_BSD, cache)`.

    `prefix_BS`: which tokens see their whole prefix; None = there is no prefix. With a cache all of
    a row's prefix comes in one call.
    """

    def __init__(self, key: Array, cfg: ModelConfig, mask: str):
        self.cfg, self.mask = cfg, mask
        self.weights = Weights(key, ATTENTIONS[cfg.attention].weights(cfg), cfg.param_dtype)

    def __call__(
        self,
        x_BSD: Array,
        segment_BS: Array,
        position_BS: Array,
        prefix_BS: Array | None,
    ) -> Array:
        cfg = self.cfg
        kind = ATTENTIONS[cfg.attention]
        q, k, v = self._turned(x_BSD, position_BS)

        def keys(segment_BS, prefix_BS):
            return kind.keys(self.mask, segment_BS, prefix_BS, cfg.attention_options)

        with jax.named_scope("attention"):
            o = _sharded_core(q, k, v, keys, (segment_BS, prefix_BS), cfg)
        return write(self.weights, o, cfg)

    def cached(
        self,
        x_BSD: Array,
        position_BS: Array,
        cache: Cache,
        prefix_BS: Array | None,
        chosen_BM: Array | None,
    ) -> tuple[Array, Cache]:
        """Writes new keys and values at their positions, then attends to the slots that the
        attention shows to each token.

        `chosen_BM`: which slots hold a key at all; None = all up to a token's own.
        """
        cfg = self.cfg
        kind = ATTENTIONS[cfg.attention]
        q, k, v = self._turned(x_BSD, position_BS)
        last_BS = position_BS if prefix_BS is None else _last_seen(position_BS, prefix_BS)

        def on_device(q, k, v, position_BS, last_BS, cache, chosen_BM):
            row_B1 = jnp.arange(q.shape[0])[:, None]
            # A position behind the cache is that of padding, which is written nowhere.
            k_BMGA = cache.k_BMGA.at[row_B1, position_BS].set(k, mode="drop")
            v_BMGA = cache.v_BMGA.at[row_B1, position_BS].set(v, mode="drop")
            num_slots = k_BMGA.shape[1]
            mask_BSM = kind.slots(position_BS, last_BS, num_slots, cfg.attention_options)
            if chosen_BM is not None:
                mask_BSM = mask_BSM & chosen_BM[:, None, :]
            o = decode_attention(q, k_BMGA, v_BMGA, mask_BSM, scale=cfg.head_dim**-0.5)
            return o, Cache(k_BMGA, v_BMGA)

        caches = Cache(HEADS, HEADS)
        specs = (HEADS, HEADS, HEADS, TOKENS, TOKENS, caches, TOKENS)
        run = jax.shard_map(on_device, in_specs=specs, out_specs=(HEADS, caches))
        with jax.named_scope("attention"):
            o, cache = run(q, k, v, position_BS, last_BS, cache, chosen_BM)
        return write(self.weights, o, cfg), cache

    def _turned(self, x_BSD: Array, position_BS: Array) -> tuple[Array, Array, Array]:
        """(queries, keys, values); the first two turned by their positions."""
        cfg = self.cfg
        cos, sin = angles(position_BS, cfg)
        q = project(self.weights, "q", x_BSD, cfg)
        k = project(self.weights, "k", x_BSD, cfg)
        v = project(self.weights, "v", x_BSD, cfg)
        # A score then depends on how far two tokens are apart. Values are read, wherever they are.
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class CrossAttention(nnx.Module):
    """`cross(x_BSD, segment_BS, memory) -> y_BSD`, where `memory = cross.remember(source_BTD,
    segment_BT)`.
    """

    def __init__(self, key: Array, cfg: ModelConfig):
        self.cfg = cfg
        self.weights = Weights(key, projections(cfg), cfg.param_dtype)

    def remember(self, source_BTD: Array, segment_BT: Array) -> Memory:
        """Returns keys and values of the source, for any number of queries."""
        k = project(self.weights, "k", source_BTD, self.cfg)
        v = project(self.weights, "v", source_BTD, self.cfg)
        return Memory(k, v, segment_BT)

    def __call__(self, x_BSD: Array, segment_BS: Array, memory: Memory) -> Array:
        q = project(self.weights, "q", x_BSD, self.cfg)
        segments = (segment_BS, memory.segment_BT)
        with jax.named_scope("cross_attention"):
            o = _sharded_core(q, memory.k_BTGA, memory.v_BTGA, across, segments, self.cfg)
        return write(self.weights, o, self.cfg)


def project(weights: Weights, name: str, x_BSD: Array, cfg: ModelConfig) -> Array:
    """Queries, keys or values [B, S, H or G, A] of x."""
    w_DHA = gather(weights[name], ("embed", "heads", None), cfg.dtype)
    y = jnp.einsum("BSD,DHA->BSHA", x_BSD, w_DHA)
    if cfg.attention_bias:
        bias_HA = weights[f"{name}_bias"].astype(cfg.dtype)
        y = y + bias_HA[None, None]
    # Norms keep scores bounded; a value has no score.
    if cfg.qk_norm and name != "v":
        # A scale [A] is that of each head, one [H, A] that of all heads together.
        y = rms_norm(y, weights[f"{name}_norm_scale"], cfg.norm_epsilon)
    return y


def angles(position_BS: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """Returns cos and sin [B, S, 1, A] of the rotary angles, with the scaling of the config."""
    scaling, options = ROPE_SCALINGS[cfg.rope_scaling], cfg.rope_scaling_options

    def scaled(frequency_P: Array) -> Array:
        return scaling.frequencies(frequency_P, cfg.rope_theta, options)

    cos, sin = rope(position_BS, cfg.head_dim, cfg.rope_theta, cfg.dtype, scaled)
    magnitude = scaling.magnitude(options)
    return cos * magnitude, sin * magnitude


def write(weights: Weights, o_BSHA: Array, cfg: ModelConfig) -> Array:
    """Returns what the heads add to the residual stream."""
    w_HAD = gather(weights["o"], ("heads", None, "embed"), cfg.dtype)
    y_BSD = jnp.einsum("BSHA,HAD->BSD", o_BSHA, w_HAD, out_sharding=P(BATCH, None, None))
    if cfg.output_bias:
        bias_D = weights["o_bias"].astype(cfg.dtype)
        y_BSD = y_BSD + bias_D[None, None]
    return y_BSD


def _last_seen(position_BS: Array, prefix_BS: Array) -> Array:
    """The last slot that each token sees: of the whole prefix for its tokens, else its own."""
    end_B1 = jnp.where(prefix_BS, position_BS, 0).max(1, keepdims=True)
    return jnp.where(prefix_BS, end_B1, position_BS)


def _sharded_core(
    q, k, v, keys: Callable[..., Keys], about: tuple[Array | None, ...], cfg: ModelConfig
) -> Array:
    """`keys(*about)`: which keys each query sees."""

    def on_device(q, k, v, about):
        scale = cfg.head_dim**-0.5
        return attention(q, k, v, keys(*about), scale=scale, kernel=cfg.attention_kernel)

    run = jax.shard_map(
        on_device,
        in_specs=(HEADS, HEADS, HEADS, TOKENS),
        out_specs=HEADS,
        # The kernels of that library do not tell what varies. All that has a gradient here is split
        # over every axis, so no sum over devices depends on it.
        check_vma=cfg.attention_kernel != SPLASH,
    )
    return run(q, k, v, about)
