"""Self-attention within a segment, and its cache; and cross-attention.

Which attention it is (attentions/) says what queries, keys and values are, and which keys a token
sees. Cross-attention sees the whole
source row. It has no rotary embedding: positions of two languages are not on one axis, and T5
(Raffel et al. 2020, arXiv:1910.10683) and Marian have no position in it either; queries and keys
know their places from self-attention.

Heads are split over `model`, rows over `data` and `expert`, and the tokens of a row over `seq`
(parallel/context.py): then keys and values of whole rows are gathered, and queries stay.

The core runs inside a shard_map because its CPU kernel loops over heads and blocks, which
global-view code may not do over a sharded dimension.

Shapes: B rows, S sequence, T tokens of a source row, D model, H query heads, G key-value heads, A
head width, M slots of the cache.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.models.attention_bias import TABLE
from moe_jax.models.attention_core import (
    OF_JAX,
    Keys,
    across,
    attention,
    decode_attention,
    of_own,
)
from moe_jax.models.attention_layout import SAVED, Scores
from moe_jax.models.attentions import ATTENTIONS, heads
from moe_jax.models.attentions.contract import HEADS, TOKENS
from moe_jax.models.attentions.heads import SINKS, project, projections
from moe_jax.models.layers import gather, linear
from moe_jax.moe.dispatch.exchange import all_gather
from moe_jax.parallel import context
from moe_jax.parallel.apart import apart
from moe_jax.parallel.mesh import P
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weights


class Memory(NamedTuple):
    """Keys and values of the source rows for the cross-attention of one block: constant while the
    target is decoded.
    """

    k_BTGA: Any
    v_BTGA: Any
    # 0 = padding.
    segment_BT: Any


class Learned(NamedTuple):
    """Numbers of each query head that stand beside its scores, or their specs."""

    # A score that it gives to nothing [H]; None = without sinks.
    sink_H: Any = None
    # What is added to a score by the distance of two tokens [L, H]; None = nothing.
    bias_LH: Any = None


OF_HEADS = Learned(P("model"), P(None, "model"))
# Weights by name.
Shared = Mapping[str, Array]


class SelfAttention(nnx.Module):
    """`attend(x_BSD, segment_BS, position_BS, prefix_BS, shared) -> y_BSD`, of whole rows;
    `attend.cached(x_BSD, position_BS, cache, prefix_BS, chosen_BM, shared) -> (y_BSD, cache)`.

    `prefix_BS`: which tokens see their whole prefix; None = there is no prefix. With a cache all of
    a row's prefix comes in one call. `shared`: the weights that the blocks of the stack share.
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
        shared: Shared,
    ) -> Array:
        cfg = self.cfg
        kind = ATTENTIONS[cfg.attention]
        if context.is_split(x_BSD):
            # A device of seq has some tokens of each row, and turns them by their own positions.
            position_BS = context.enter(position_BS)
        q, k, v = kind.inputs(self.weights, x_BSD, position_BS, cfg)

        def keys(segment_BS, prefix_BS):
            return kind.keys(self.mask, segment_BS, prefix_BS, cfg.attention_options)

        with jax.named_scope("attention"):
            about = (segment_BS, prefix_BS)
            learned = Learned(self._sinks(), self._bias(shared))
            o = _sharded_core(q, k, v, keys, about, self._scores(), learned, cfg)
        return write(self.weights, o, cfg)

    def cached(
        self,
        x_BSD: Array,
        position_BS: Array,
        cache: Any,
        prefix_BS: Array | None,
        chosen_BM: Array | None,
        shared: Shared,
    ) -> tuple[Array, Any]:
        """Writes what the cache keeps of new tokens at their positions, then attends to the slots
        that the attention shows to each token.

        `chosen_BM`: which slots hold a key at all; None = all up to a token's own.
        """
        cfg = self.cfg
        kind = ATTENTIONS[cfg.attention]
        caching = kind.caching
        q, new = caching.inputs(self.weights, x_BSD, position_BS, cfg)
        # Slots are numbered by position, so the last slot that a token sees is its own.
        last_BS = position_BS if prefix_BS is None else _last_seen(position_BS, prefix_BS)

        # Every device of "model" has the cache of its heads, and writes to it alone.
        def on_device(q, new, position_BS, last_BS, cache, chosen_BM, learned):
            cache = _put(cache, new, position_BS, caching.slot_axes)
            k_BGAM, v_BGMA = caching.keys_and_values(cache)
            mask_BSM = kind.slots(position_BS, last_BS, cache.num_slots, cfg.attention_options)
            if chosen_BM is not None:
                mask_BSM = mask_BSM & chosen_BM[:, None, :]
            more = {**self._scores()._asdict(), **learned._asdict()}
            o = decode_attention(q, k_BGAM, v_BGMA, mask_BSM, **more, position_Bq=position_BS)
            return o, cache

        specs = (HEADS, caching.new_specs, TOKENS, TOKENS, caching.specs, TOKENS, OF_HEADS)
        run = jax.shard_map(on_device, in_specs=specs, out_specs=(HEADS, caching.specs))
        with jax.named_scope("attention"):
            learned = Learned(self._sinks(), self._bias(shared))
            o, cache = run(q, new, position_BS, last_BS, cache, chosen_BM, learned)
        o = caching.outputs(self.weights, o, cfg)
        return write(self.weights, o, cfg), cache

    def _scores(self) -> Scores:
        """Returns what becomes of products of queries and keys."""
        kind = ATTENTIONS[self.cfg.attention]
        buckets = kind.buckets(self.mask, self.cfg.attention_options)
        return Scores(kind.scale(self.cfg), self.cfg.attention_cap, buckets)

    def _bias(self, shared: Shared) -> Array | None:
        """Returns what is added to scores by the distance of two tokens [L, H]; None = nothing."""
        return shared[TABLE] if self._scores().buckets else None

    def _sinks(self) -> Array | None:
        """Returns the score that each query head gives to nothing [H]; None without sinks."""
        return self.weights[SINKS] if self.cfg.attention_sinks else None


class CrossAttention(nnx.Module):
    """`cross(x_BSD, segment_BS, memory) -> y_BSD`, where `memory = cross.remember(source_BTD,
    segment_BT)`.
    """

    def __init__(self, key: Array, cfg: ModelConfig):
        self.cfg = cfg
        self.weights = Weights(key, projections(cfg), cfg.param_dtype)

    def remember(self, source_BTD: Array, segment_BT: Array) -> Memory:
        """Returns keys and values of the source, for any number of queries."""
        # No rotary embedding: places of the source and of the target are not on one axis.
        k = project(self.weights, "k", source_BTD, self.cfg)
        v = project(self.weights, "v", source_BTD, self.cfg)
        return Memory(k, v, segment_BT)

    def __call__(self, x_BSD: Array, segment_BS: Array, memory: Memory) -> Array:
        q = project(self.weights, "q", x_BSD, self.cfg)
        segments = (segment_BS, memory.segment_BT)
        scores = Scores(heads.scale(self.cfg), self.cfg.attention_cap)
        k, v = memory.k_BTGA, memory.v_BTGA
        with jax.named_scope("cross_attention"):
            o = _sharded_core(q, k, v, across, segments, scores, Learned(), self.cfg)
        return write(self.weights, o, self.cfg)


def _put(cache: Any, new: Any, position_BS: Array, slot_axes: Any) -> Any:
    """Returns a cache with what it keeps of new tokens [B, S, ...] at their positions.

    `slot_axes`: as in Caching.
    """
    row_B1 = jnp.arange(position_BS.shape[0])[:, None]

    def put(old: Array, new: Array, slot_axis: int) -> Array:
        between = (slice(None),) * (old.ndim + slot_axis - 1)
        # A position behind the cache is that of padding, which is written nowhere.
        return old.at[row_B1, *between, position_BS].set(new, mode="drop")

    def put_all(cache: Any) -> Any:
        return jax.tree.map(put, cache, new, slot_axes)

    if position_BS.size > 1:
        return put_all(cache)
    # A single write is one slice, which would be fused into what reads the cache as well as into
    # the result: then each step copies all of it.
    return apart(put_all, cache, position_BS[0, 0])


def write(weights: Weights, o_BSHA: Array, cfg: ModelConfig) -> Array:
    """Returns what the heads add to the residual stream."""
    w_HAD = gather(weights["o"], ("heads", None, "embed"), cfg.dtype)
    tokens = context.tokens_spec(o_BSHA, None)
    with jax.named_scope("out_projection"):
        y_BSD = linear(o_BSHA, w_HAD, cfg.dtype, tokens)
    if cfg.output_bias:
        # Whole on every device of "model", so it is added once, after the sum over heads.
        bias_D = weights["o_bias"].astype(cfg.dtype)
        y_BSD = y_BSD + bias_D[None, None]
    return y_BSD


def _last_seen(position_BS: Array, prefix_BS: Array) -> Array:
    """Returns the last slot that each token sees: the end of the prefix for its tokens, else its
    own.
    """
    end_B1 = jnp.where(prefix_BS, position_BS, 0).max(1, keepdims=True)
    return jnp.where(prefix_BS, end_B1, position_BS)


def whole_rows(k_BTGA: Array) -> Array:
    """Returns keys or values of whole rows, of the tokens of this device, inside of a shard_map.

    Its backward pass is a reduce-scatter.
    """
    with jax.named_scope("gather_keys"):
        in_turn = all_gather(k_BTGA, context.AXIS, 1)
        return context.reordered(in_turn, jax.lax.axis_size(context.AXIS))


def _sharded_core(
    q,
    k,
    v,
    keys: Callable[..., Keys],
    about: tuple[Array | None, ...],
    scores: Scores,
    learned: Learned,
    cfg: ModelConfig,
) -> Array:
    """Returns what each head reads, in the shape of q; every device has its rows and heads.

    `keys(*about)` says which keys each query sees; `about` is of whole rows.
    """
    more: dict[str, Any] = {**scores._asdict(), "kernel": cfg.attention_kernel}

    def on_device(q, k, v, about, learned):
        return attention(q, k, v, keys(*about), **learned._asdict(), **more)

    def on_device_of_seq(q, k, v, about, learned):
        k, v = whole_rows(k), whole_rows(v)
        return attention(q, k, v, of_own(keys(*about)), **learned._asdict(), **more)

    heads = context.tokens_spec(q, "model", None)
    if context.is_split(q):
        # Keys and values of whole rows are gathered once more in the backward pass, and kept by no
        # block.
        policy = jax.checkpoint_policies.save_only_these_names(SAVED)
        on_device = jax.checkpoint(on_device_of_seq, policy=policy)
    run = jax.shard_map(
        on_device,
        in_specs=(heads, heads, heads, TOKENS, OF_HEADS),
        out_specs=heads,
        # The kernels of JAX do not tell what varies. All that has a gradient here is split
        # over every axis, so no sum over devices depends on it.
        check_vma=cfg.attention_kernel not in OF_JAX,
    )
    return run(q, k, v, about, learned)
