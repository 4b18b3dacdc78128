"""The block which all models that have blocks are made of.

A block is `x + attention(norm(x))`, then `x + feed_forward(norm(x))`, where the feed-forward is
dense or a mixture of experts (plus shared experts). A block may have an attention of its own
(schema/blocks.py). With model.norm_position = "after" it is
`x + norm(attention(x))`, then `x + norm(feed_forward(x))`; with "both" each part has two norms,
`x + norm(attention(norm(x)))`. Some have another mask, cross-attention
in the middle, or no attention at all. A block of kind "depth:dense" or "depth:moe" is one that only
some tokens go through (models/depth.py).

Shapes: B rows, S sequence, T tokens of a source row, D model, M slots of the cache.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.models import depth
from moe_jax.models.attention import CrossAttention, Memory, SelfAttention, Shared
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.ends import norm_scale
from moe_jax.models.layers import FeedForward, dropout, norm
from moe_jax.moe.experts.network import Chosen
from moe_jax.moe.layer import Batch, MoELayer
from moe_jax.moe.settings import MoE
from moe_jax.precision import wide_dtype
from moe_jax.schema.blocks import BLOCKS, attention_of, inner, is_depth, without_attention
from moe_jax.schema.config import ModelConfig
from moe_jax.schema.options import not_among
from moe_jax.weights import Weights


class Look(NamedTuple):
    """Holds what the attention of a stack of blocks sees."""

    # One of those of attentions/contract.py; "" = no attention.
    mask: str
    # Cross-attention to a source.
    cross: bool = False


class Source(NamedTuple):
    """Holds what cross-attention reads: the encoder's output, and which of it is padding."""

    x_BTD: Any
    segment_BT: Any


class Beside(NamedTuple):
    """Holds what a block reads beside tokens and batch."""

    # A Source, or the Memory that this block made of it; () = there is no cross-attention.
    source: Any = ()
    # Weights that the blocks of a stack share, by name.
    shared: Shared = {}


NOTHING = Beside()


class Block(nnx.Module):
    """`block(x_BSD, batch, rng, train, beside) -> (x_BSD, sums)`;
    `block.cached(x_BSD, batch, rng, cache, beside) -> (x_BSD, cache)`.

    `batch` has the request to this block alone, and `rng` is a key of its own. A cache is that of
    its attention, of a depth block a DepthCache.
    """

    def __init__(self, key: Array, kind: str, cfg: ModelConfig, look: Look):
        # One for the norms, the attention, the dense part and the experts.
        keys = jax.random.split(key, 4)
        cfg = cfg.of_block(kind)
        self.cfg, self.look = cfg, look
        self.kind, self.wrapped = inner(kind), is_depth(kind)
        # Every part has a norm, or two.
        parts = {"attention": bool(look.mask), "cross": look.cross, "ffn": True}
        there = [name for name in parts if parts[name]]
        norms = {f"{name}_norm_scale": norm_scale(cfg) for name in there}
        if cfg.norm_position == "both":
            norms |= {f"{name}_after_norm_scale": norm_scale(cfg) for name in there}
        self.norms = Weights(keys[0], norms, cfg.param_dtype)
        if look.mask:
            self.attention = SelfAttention(keys[1], cfg, look.mask)
        if look.cross:
            # Folded in and not split: a block without it draws what it always drew.
            self.cross = CrossAttention(jax.random.fold_in(key, 5), cfg)
        # The feed-forward of a dense block, or the shared experts of a sparse one.
        width = dense_width(self.kind, cfg)
        if width:
            chosen = Chosen(cfg.activation, cfg.activation_options)
            sizes = (cfg.d_model, width, chosen, out_std(width, cfg))
            gated = self.kind == "moe" and cfg.moe.shared_gate
            self.dense = FeedForward(keys[2], *sizes, cfg.param_dtype, gated, cfg.ffn_numbers)
        if self.kind == "moe":
            self.moe = MoELayer(keys[3], moe_config(cfg))
        if self.wrapped:
            # As a router's: near the threshold a rounded score would choose other tokens.
            wide = jnp.dtype(wide_dtype(cfg.param_dtype)).name
            self.depth = Weights(jax.random.fold_in(key, 4), depth.declare(cfg), wide)

    def __call__(
        self, x_BSD: Array, batch: Batch, rng: Array, train: bool, beside: Beside = NOTHING
    ) -> tuple[Array, depth.Sums]:
        if not self.wrapped:
            attended, fed, sums = self._added(x_BSD, batch, rng, train, beside)
            return x_BSD + attended + fed, sums

        # Only the chosen tokens come here: C of each row.
        def update(x_BCD, batch):
            attended, fed, sums = self._added(x_BCD, batch, rng, train, beside)
            return attended + fed, sums

        return depth.through(update, self.depth["router"], x_BSD, batch, train, self.cfg)

    def cached(
        self, x_BSD: Array, batch: Batch, rng: Array, cache: Any, beside: Beside = NOTHING
    ) -> tuple[Array, Any]:
        """Returns the tokens after the block, which follow those in its cache, and the cache with
        them.
        """
        if not self.wrapped:
            attended, fed, cache = self._added_cached(x_BSD, batch, rng, cache, None, beside)
            return x_BSD + attended + fed, cache

        # With a cache all tokens come, and those that are not chosen are padding.
        def update(x_BSD, batch, cache, chosen_BM):
            attended, fed, cache = self._added_cached(x_BSD, batch, rng, cache, chosen_BM, beside)
            return attended + fed, cache

        return depth.cached(update, self.depth["router"], x_BSD, batch, cache, self.cfg)

    def remember(self, source: Source | Memory) -> Memory:
        """Returns keys and values of the source for the cross-attention of this block."""
        if isinstance(source, Memory):
            return source
        return self.cross.remember(source.x_BTD, source.segment_BT)

    def _added(
        self, x_BSD: Array, batch: Batch, rng: Array, train: bool, beside: Beside
    ) -> tuple[Array, Array, depth.Sums]:
        """Returns (what attention adds to the stream, what the feed-forward adds, sums)."""
        # Where there is no attention, nothing is added: bits are those of a sum with zero.
        attended = jnp.zeros_like(x_BSD)
        if self.look.mask:
            h = self._before("attention", x_BSD)
            places = (batch.segment_BS, batch.position_BS, self._prefix(batch))
            attended = self._after("attention", self.attention(h, *places, beside.shared))
        return self._rest(x_BSD, attended, batch, rng, train, beside.source)

    def _added_cached(
        self,
        x_BSD: Array,
        batch: Batch,
        rng: Array,
        cache: Any,
        chosen_BM: Array | None,
        beside: Beside,
    ) -> tuple[Array, Array, Any]:
        """Returns (what attention adds, what the feed-forward adds, cache)."""
        h = self._before("attention", x_BSD)
        seen = (self._prefix(batch), chosen_BM)
        attended, cache = self.attention.cached(h, batch.position_BS, cache, *seen, beside.shared)
        attended = self._after("attention", attended)
        attended, fed, _ = self._rest(x_BSD, attended, batch, rng, False, beside.source)
        return attended, fed, cache

    def _rest(
        self,
        x_BSD: Array,
        attended: Array,
        batch: Batch,
        rng: Array,
        train: bool,
        source: Any,
    ) -> tuple[Array, Array, depth.Sums]:
        """Returns (what attention of both kinds adds, what the feed-forward adds, sums), from what
        self-attention says.
        """
        cfg = self.cfg
        # Dropout of attention, the router's noise, dropout of the feed-forward.
        keys = jax.random.split(rng, 3)

        def drop(y, key):
            return dropout(y, cfg.dropout if train else 0.0, key, batch.row_B)

        if self.look.mask:
            attended = drop(attended, keys[0])
        if self.look.cross:
            h = self._before("cross", x_BSD + attended)
            # Behind self-attention, so that a query knows where its token stands in the target.
            crossed = self.cross(h, batch.segment_BS, self.remember(source))
            crossed = self._after("cross", crossed)
            attended = attended + drop(crossed, jax.random.fold_in(keys[0], 1))
        h = self._before("ffn", x_BSD + attended)
        y, sums = jnp.zeros_like(h), {}
        if self.kind == "moe":
            y, sums = self.moe(h, batch, keys[1], train)
        # The feed-forward of a dense block, or the shared experts beside the routed ones.
        if hasattr(self, "dense"):
            y = y + self.dense(h)
        y = self._after("ffn", y)
        return attended, drop(y, keys[2]), sums

    def _before(self, part: str, x_BSD: Array) -> Array:
        """Returns what a part reads: the residual stream, normalised unless norms come after."""
        return x_BSD if self.cfg.norm_position == "after" else self._normed(part, x_BSD)

    def _after(self, part: str, y_BSD: Array) -> Array:
        """Returns what a part adds to the residual stream: its output, normalised if norms come
        after.
        """
        if self.cfg.norm_position == "before":
            return y_BSD
        # Of two the second has a name of its own.
        both = self.cfg.norm_position == "both"
        return self._normed(f"{part}_after" if both else part, y_BSD)

    def _normed(self, part: str, x_BSD: Array) -> Array:
        return norm(x_BSD, self.norms[f"{part}_norm_scale"], self.cfg)

    def _prefix(self, batch: Batch) -> Array | None:
        """Returns which tokens see their whole prefix; None where there is no prefix."""
        if self.look.mask != "prefix" or not isinstance(batch.prefix_BS, Array):
            return None
        return batch.prefix_BS


def kind_refusals(path: str, kind: str) -> Iterator[str]:
    """Yields what is wrong with the kind of a block, which stands in the key `path`."""
    yield from not_among(path, without_attention(kind), BLOCKS)
    if name := attention_of(kind):
        yield from not_among(f'{path}, the attention of "{kind}"', name, tuple(ATTENTIONS))


def dense_width(kind: str, cfg: ModelConfig) -> int:
    """Returns the hidden width of what every token of a block goes through: the feed-forward, or
    the shared experts; 0 = there is none.
    """
    return cfg.ffn_hidden if kind == "dense" else cfg.moe.shared_width


def out_std(width: int, cfg: ModelConfig) -> float:
    """Returns the standard deviation of the first value of a matrix that writes to the residual
    stream.
    """
    # Two of them in each block, so that all together add a variance of about one.
    return width**-0.5 * (2 * len(cfg.blocks)) ** -0.5


def moe_config(cfg: ModelConfig) -> MoE:
    """Returns what the MoE layer is told: its block of the config, and what it shares."""
    moe = cfg.moe
    return MoE(
        num_experts=moe.num_experts,
        expert_hidden=moe.expert_hidden,
        group_rows=moe.group_rows,
        router=moe.router,
        router_options=moe.router_options,
        ordering=moe.ordering,
        ordering_options=moe.ordering_options,
        dispatcher=moe.dispatcher,
        dispatcher_options=moe.dispatcher_options,
        overlap_chunks=moe.overlap_chunks,
        adaptive=moe.adaptive,
        stored=moe.sparse.stored,
        expert_kernel=moe.expert_kernel,
        numbers=cfg.ffn_numbers,
        d_model=cfg.d_model,
        vocab_size=cfg.vocab_size,
        activation=cfg.activation,
        activation_options=cfg.activation_options,
        expert_bias=moe.expert_bias,
        latent_dim=moe.latent_dim,
        param_dtype=cfg.param_dtype,
        dtype=cfg.dtype,
        out_std=out_std(moe.expert_hidden, cfg),
    )
