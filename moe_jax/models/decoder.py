"""The decoder: embedding, a pattern of pre-norm blocks (prefix, period x repeats, suffix), final
norm, head. Global view.

A block is `x + attention(norm(x))`, then `x + feed_forward(norm(x))`, where the feed-forward is
dense or a mixture of experts (plus shared experts); the other models are made of the same blocks,
with another mask, cross-attention in the middle, or no attention at all. A block of kind
"depth:dense" or "depth:moe" is one that only some tokens go through (models/depth.py). With `scan`,
one period is stacked over the repeats and run by lax.scan: equal first values, equal functions.
Every block returns `(x, sums)`; the sums of one name are stacked to [L, B, ...] in the order of the
blocks that have it: the MoE blocks, or the depth blocks.

Shapes: B rows, S sequence, D model, V vocabulary, L MoE layers, M length of the cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import layout
from moe_jax.models import depth
from moe_jax.models.attention import Attention, Cache, CrossAttention, Memory
from moe_jax.models.contract import Kind
from moe_jax.models.layers import FeedForward, dropout, gather, rms_norm
from moe_jax.moe.layer import Batch, MoE, MoELayer
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.schema.blocks import KindOptions
from moe_jax.schema.config import ModelConfig
from moe_jax.schema.options import option
from moe_jax.weights import Weight, Weights


@dataclasses.dataclass(frozen=True)
class Options(KindOptions):
    bidirectional_prefix: bool = option(
        False, "a row's prefix (the source of a translation) sees all of itself"
    )


NAME = "decoder"
# What the backward pass keeps of a block instead of recomputing it.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": None,  # keep everything: no rematerialisation
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dispatch": jax.checkpoint_policies.save_only_these_names(
        "moe_dispatch"
    ),  # the tokens that travelled
}


# Standard deviation of the first logits. 1 costs half a nat at the first step, and of a tied head
# five nats; 0 would give no gradient to anything but the head there, so that a proof at the first
# step would prove nothing (docs/first_values.md).
FIRST_LOGITS = 0.1


class Source(NamedTuple):
    """Holds what cross-attention reads: the encoder's output, and which of it is padding."""

    x_BTD: Any
    segment_BT: Any


class Context(NamedTuple):
    """Holds what every block reads beside the residual stream."""

    batch: Batch
    rng: jax.Array
    index: jax.Array  # of the block: each folds it into its key
    # for cross-attention: a Source, or a Memory, the keys and values that this block already made
    # of it
    source: Any = ()


class Look(NamedTuple):
    """Holds what the attention of a stack of blocks sees."""

    # "full" = the whole segment, "prefix" = where batch.prefix_BS is not 0 the prefix, "none" =
    # no attention
    mask: str = "causal"
    cross: bool = False  # cross-attention to context.source


class Block(nnx.Module):
    def __init__(self, key: jax.Array, kind: str, cfg: ModelConfig, look: Look):
        keys = jax.random.split(key, 4)
        self.cfg, self.kind, self.wrapped, self.look = (
            cfg,
            depth.inner(kind),
            kind != depth.inner(kind),
            look,
        )
        parts = {"attention": look.mask != "none", "cross": look.cross, "ffn": True}
        scale = Weight((cfg.d_model,), (None,), 0.0, 1.0)
        self.norms = Weights(
            keys[0], {f"{n}_norm_scale": scale for n in parts if parts[n]}, cfg.param_dtype
        )
        if parts["attention"]:
            self.attention = Attention(keys[1], cfg, "full" if look.mask == "full" else "causal")
        if look.cross:
            self.cross = CrossAttention(jax.random.fold_in(key, 5), cfg)
        width = (
            cfg.ffn_hidden
            if self.kind == "dense"
            else cfg.moe.shared_experts * cfg.moe.expert_hidden
        )
        if width:
            self.dense = FeedForward(
                keys[2], cfg.d_model, width, cfg.activation, out_std(width, cfg), cfg.param_dtype
            )
        if self.kind == "moe":
            self.moe = MoELayer(keys[3], moe_config(cfg))
        if self.wrapped:
            wide = str(jnp.promote_types(cfg.param_dtype, jnp.float32))
            self.depth = Weights(jax.random.fold_in(key, 4), depth.declare(cfg), wide)

    def __call__(self, x_BSD: jax.Array, context: Context, train: bool, cache: Any = None):
        """(x_BSD, sums, cache); `cache`: a Cache, or a DepthCache."""
        context = context._replace(batch=of_block(context.batch, context.index))
        if self.wrapped:
            router_D = self.depth["router"]
            if cache is not None:
                x_BSD, cache = depth.cached(self._update, router_D, x_BSD, context, cache, self.cfg)
                return x_BSD, {}, cache
            return *depth.through(self._update, router_D, x_BSD, context, train, self.cfg), None
        (attended, fed), sums, cache = self._parts(x_BSD, context, train, cache, None)
        return x_BSD + attended + fed, sums, cache

    def _update(self, *args):
        """Returns what the block adds to the residual stream; otherwise as `_parts`."""
        (attended, fed), sums, cache = self._parts(*args)
        return attended + fed, sums, cache

    def _parts(
        self,
        x_BSD: jax.Array,
        context: Context,
        train: bool,
        cache: Cache | None,
        seen_BM: jax.Array | None,
    ):
        """((what attention adds, what the feed-forward adds), sums, cache)."""
        cfg, batch = self.cfg, context.batch
        keys = jax.random.split(jax.random.fold_in(context.rng, context.index), 3)

        def drop(y, key):
            return dropout(y, cfg.dropout if train else 0.0, key, batch.row_B)

        attended = jnp.zeros_like(x_BSD)
        if self.look.mask != "none":
            h = rms_norm(x_BSD, self.norms["attention_norm_scale"], cfg.norm_epsilon)
            has_prefix = self.look.mask == "prefix" and isinstance(batch.prefix_BS, jax.Array)
            prefix_BS = batch.prefix_BS if has_prefix else None
            y, cache = self.attention(
                h, batch.segment_BS, batch.position_BS, cache, seen_BM, prefix_BS
            )
            attended = drop(y, keys[0])
        if self.look.cross:
            h = rms_norm(x_BSD + attended, self.norms["cross_norm_scale"], cfg.norm_epsilon)
            y = self.cross(h, batch.segment_BS, self.remember(context.source))
            attended = attended + drop(y, jax.random.fold_in(keys[0], 1))
        h = rms_norm(x_BSD + attended, self.norms["ffn_norm_scale"], cfg.norm_epsilon)
        y, sums = (
            self.moe(h, batch, keys[1], train) if self.kind == "moe" else (jnp.zeros_like(h), {})
        )
        if hasattr(self, "dense"):
            y = y + self.dense(h)
        return (attended, drop(y, keys[2])), sums, cache

    def remember(self, source: Source | Memory) -> Memory:
        """Keys and values of the source for the cross-attention of this block."""
        return (
            source
            if isinstance(source, Memory)
            else self.cross.remember(source.x_BTD, source.segment_BT)
        )


class Period(nnx.Module):
    """The blocks that repeat."""

    def __init__(self, key: jax.Array, cfg: ModelConfig, look: Look):
        self.blocks = blocks(key, cfg.period, cfg, look)


class Decoder(nnx.Module):
    """`model(batch, rng, train) -> (logits_BSV, sums)`; `model.cached(batch, caches) ->
    (logits_BSV, caches)`.
    """

    repeats: Any

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        self.cfg = cfg
        keys = jax.random.split(key, 4)
        ends = {
            "embed": embedding(cfg, cfg.tie_embeddings),
            "norm_scale": Weight((cfg.d_model,), (None,), 0.0, 1.0),
        }
        if not cfg.tie_embeddings:
            ends["head"] = output_head(cfg)
        self.ends = Weights(keys[0], ends, cfg.param_dtype)
        look = Look("prefix" if bidirectional(cfg) else "causal")
        self.prefix, self.repeats, self.suffix = stack(keys[1:], cfg, look)

    def __call__(
        self, batch: Batch, rng: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        cfg = self.cfg
        x = embed(self.ends["embed"], batch.id_BS, cfg)
        x = dropout(x, cfg.dropout if train else 0.0, jax.random.fold_in(rng, 0), batch.row_B)
        x, sums = run_stack(self, x, Context(batch, rng, jnp.int32(1)), train)
        return unembed(self.ends, x, cfg), sums

    def cached(self, batch: Batch, caches: list[Any]) -> tuple[jax.Array, list[Any]]:
        """Logits of the tokens of `batch`, which follow those in the caches (one a block, in
        order). Loop layout only.
        """
        x = embed(self.ends["embed"], batch.id_BS, self.cfg)
        sources = [()] * len(caches)
        x, new = run_cached(self, x, batch, caches, sources)
        return unembed(self.ends, x, self.cfg), new


def embedding(cfg: ModelConfig, tied: bool = False) -> Weight:
    """Returns the embedding [V, D].

    `tied`: it is the head, too, and begins as small as a head does.

    The logit of the token itself would otherwise be about sqrt(D): a guess that every token
    repeats.
    """
    std = (FIRST_LOGITS if tied else 1.0) * cfg.d_model**-0.5
    return Weight((cfg.vocab_size, cfg.d_model), ("vocab", "embed"), std)


def output_head(cfg: ModelConfig) -> Weight:
    """Returns the head [D, V], drawn so that first logits have standard deviation FIRST_LOGITS."""
    std = FIRST_LOGITS * cfg.d_model**-0.5
    return Weight((cfg.d_model, cfg.vocab_size), ("embed", "vocab"), std)


def embed(table_VD: jax.Array, id_BS: jax.Array, cfg: ModelConfig) -> jax.Array:
    table = gather(table_VD, ("vocab", "embed"), cfg.dtype)
    return table.at[id_BS].get(out_sharding=P(BATCH, None, None)) * cfg.d_model**0.5


def unembed(ends: Weights, x_BSD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Final norm and head: logits in at least float32."""
    x = rms_norm(x_BSD, ends["norm_scale"], cfg.norm_epsilon)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if cfg.tie_embeddings:
        table = gather(ends["embed"], ("vocab", "embed"), cfg.dtype)
        return jnp.einsum("BSD,VD->BSV", x, table, preferred_element_type=wide)
    head = gather(ends["head"], ("embed", "vocab"), cfg.dtype)
    return jnp.einsum("BSD,DV->BSV", x, head, preferred_element_type=wide)


# A stack of blocks: a module has them as `prefix`, `repeats` (as layout.draw_repeats makes them)
# and
# `suffix`.


def blocks(key: jax.Array, kinds: tuple[str, ...], cfg: ModelConfig, look: Look) -> nnx.List:
    return nnx.List(
        [Block(jax.random.fold_in(key, i), kind, cfg, look) for i, kind in enumerate(kinds)]
    )


def stack(keys: jax.Array, cfg: ModelConfig, look: Look) -> tuple[Any, Any, Any]:
    """(prefix, repeats, suffix) from three keys."""
    prefix, suffix = blocks(keys[0], cfg.prefix, cfg, look), blocks(keys[2], cfg.suffix, cfg, look)

    def period(key):
        return Period(key, cfg, look)

    return prefix, layout.draw_repeats(period, keys[1], cfg.repeats, cfg.scan), suffix


def run_stack(
    model: Any, x_BSD: jax.Array, context: Context, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(x_BSD, sums) after all blocks of a module with `cfg`, `prefix`, `repeats` and `suffix`; the
    first has `context.index`.
    """
    cfg = model.cfg
    run = remat(cfg, train)

    def at(i):
        return context._replace(index=context.index + i)

    def run_period(period, x_BSD, repeat):
        index = len(cfg.prefix) + repeat * len(cfg.period)
        return run_blocks(run, period.blocks, x_BSD, at(index))

    x_BSD, before = run_blocks(run, model.prefix, x_BSD, context)
    x_BSD, middle = layout.run_repeats(run_period, model.repeats, x_BSD, cfg)
    last = len(cfg.prefix) + len(cfg.period) * cfg.repeats
    x_BSD, after = run_blocks(run, model.suffix, x_BSD, at(last))
    return x_BSD, layout.join_sums(jnp.concatenate, [before, middle, after])


def run_cached(
    model: Any, x_BSD: jax.Array, batch: Batch, caches: list[Any], sources: list[Any]
) -> tuple[jax.Array, list[Any]]:
    """(x_BSD, caches) after all blocks, each with its cache and what it cross-attends to."""
    context, new = Context(batch, jax.random.key(0), jnp.int32(0)), []
    for block, cache, source in zip(layout.blocks_in_order(model), caches, sources, strict=True):
        x_BSD, _, cache = block(x_BSD, context._replace(source=source), False, cache)
        new.append(cache)
    return x_BSD, new


def run_blocks(run, blocks, x_BSD: jax.Array, context: Context):
    """Runs blocks in order; the sums of each name, stacked [n, B, ...] over the n blocks that have
    it.
    """
    parts = []
    for i, block in enumerate(blocks):
        x_BSD, sums = run(block, x_BSD, context._replace(index=context.index + i))
        parts.append(sums)
    return x_BSD, layout.join_sums(jnp.stack, parts)


def empty_caches(cfg: ModelConfig, num_rows: int, length: int) -> list[Any]:
    """Caches of `length` tokens that hold none yet, one a block."""

    def at(x, *dims):
        return jax.sharding.reshard(x, P(BATCH, *dims))

    def zero():
        return at(
            jnp.zeros((num_rows, length, cfg.num_kv_heads, cfg.head_dim), cfg.dtype), None, "model"
        )

    def chosen():
        return at(jnp.zeros((num_rows, length), bool), None)

    def plain(kind):
        return kind == depth.inner(kind)

    return [
        Cache(zero(), zero()) if plain(kind) else depth.DepthCache(zero(), zero(), chosen())
        for kind in cfg.blocks
    ]


def remat(cfg: ModelConfig, train: bool):
    """How a block is called: plainly, or under jax.checkpoint with the policy that the config
    names.
    """

    def call(block, x, context):
        return block(x, context, train)[:2]

    if cfg.remat == "none":
        return call
    return jax.checkpoint(call, policy=REMAT[cfg.remat])


def of_block(batch: Batch, index: jax.Array) -> Batch:
    """Returns the batch with the request to one block, instead of that to all of them.

    `index` counts blocks from 1.
    """

    def one(z):
        return jax.lax.dynamic_index_in_dim(z, index - 1, keepdims=False)

    return batch._replace(request=jax.tree.map(one, batch.request))


def out_std(width: int, cfg: ModelConfig) -> float:
    """Returns the standard deviation of the first value of a matrix that writes to the residual
    stream.
    """
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
        adaptive=moe.adaptive,
        stored=moe.sparse.stored,
        d_model=cfg.d_model,
        vocab_size=cfg.vocab_size,
        activation=cfg.activation,
        param_dtype=cfg.param_dtype,
        dtype=cfg.dtype,
        out_std=out_std(moe.expert_hidden, cfg),
    )


def bidirectional(cfg: ModelConfig) -> bool:
    """Whether a row's prefix sees all of itself; the blocks of other kinds never ask."""
    return isinstance(cfg.kind_options, Options) and cfg.kind_options.bidirectional_prefix


def as_decoder(cfg: ModelConfig) -> ModelConfig:
    """Returns the blocks of model.prefix, period, repeats and suffix as a decoder."""
    return dataclasses.replace(cfg, kind=NAME, kind_options=Options())


def why_silent(options: Options) -> str:
    """Says that a translator of prefixes is no language model."""
    if options.bidirectional_prefix:
        return (
            "model.kinds.decoder.bidirectional_prefix = True translates a prefix, and continues no "
            "text"
        )
    return ""


KIND = Kind(
    Options,
    Decoder,
    causal=True,
    parameters=None,
    forward_flops=None,
    writes_text=True,
    why_silent=why_silent,
    instruments=True,
)
