"""A stack of blocks: a prefix, a period that repeats, a suffix.

A module that has one has them as `prefix`, `repeats` (as layout.draw_repeats makes them) and
`suffix`, and as `shared` the weights that they have in common, if there are any. With `scan`, one
period is stacked over the repeats and run by lax.scan: equal first values, equal functions. Every
block returns `(x, sums)`; the sums of one name are stacked to [L, B, ...] in the order of the
blocks that have it: the MoE blocks, or the depth blocks.

Shapes: B rows, S sequence, D model, L MoE layers, M slots of the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax import layout
from moe_jax.models import attention_layout, depth
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.block import NOTHING, Beside, Block, Look
from moe_jax.moe.dispatch import exchange
from moe_jax.moe.experts import grouped_matmul
from moe_jax.moe.layer import Batch
from moe_jax.schema.blocks import is_depth
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weight, Weights

# What the backward pass keeps of a block instead of recomputing it, by the words of model.remat.
NAMES = {
    # The output of attention and the denominators of its softmax.
    "attention": attention_layout.SAVED,
    # The tokens that travelled, so that they do not travel again.
    "dispatch": exchange.SAVED,
    # The rows that experts are given and their pre-activations: no product of theirs is repeated.
    "experts": grouped_matmul.SAVED,
}


class Period(nnx.Module):
    """The blocks that repeat."""

    def __init__(self, key: Array, cfg: ModelConfig, look: Look):
        self.blocks = blocks(key, cfg.period, cfg, look)


def blocks(key: Array, kinds: tuple[str, ...], cfg: ModelConfig, look: Look) -> nnx.List:
    """Returns a block of each kind, each with a key of its own."""
    made = []
    for i, kind in enumerate(kinds):
        made.append(Block(jax.random.fold_in(key, i), kind, cfg, look))
    return nnx.List(made)


def stack(keys: Array, cfg: ModelConfig, look: Look) -> tuple[Any, Any, Any]:
    """Returns (prefix, repeats, suffix) from three keys."""

    def period(key):
        return Period(key, cfg, look)

    prefix = blocks(keys[0], cfg.prefix, cfg, look)
    suffix = blocks(keys[2], cfg.suffix, cfg, look)
    repeats = layout.draw_repeats(period, keys[1], cfg.repeats, cfg.scan)
    return prefix, repeats, suffix


def shared_weights(cfg: ModelConfig) -> dict[str, Weight]:
    """Declares what the attentions of a stack have once for all of its blocks, by name."""
    declared = {}
    for name in dict.fromkeys(cfg.attentions):
        declared |= ATTENTIONS[name].shared(cfg.with_attention(name))
    return declared


def share(model: Any, key: Array) -> None:
    """Gives a module, whose blocks are of its `cfg`, the weights that they share, if there are any.

    `key`: of the module.
    """
    if declared := shared_weights(model.cfg):
        # Folded in and not split: a module without them draws what it always drew.
        model.shared = Weights(jax.random.fold_in(key, 6), declared, model.cfg.param_dtype)


def shared_of(model: Any) -> dict[str, Array]:
    """Returns the weights that the blocks of a module share, by name."""
    return model.shared.arrays() if hasattr(model, "shared") else {}


class Stop(NamedTuple):
    """Stands in the place of `repeats` of a module: what comes before them is computed alone."""


class Resume(NamedTuple):
    """Stands in the place of `repeats` of a module: what comes after them is computed alone."""

    # What the repeats make of the tokens.
    x_BSD: Any


class Reached(Exception):
    """Holds what has been computed when the blocks of a Stop are reached."""

    def __init__(self, x_BSD: Array, sums: dict[str, Array], batch: Batch, rng: Array):
        super().__init__("the repeats of a stack are computed elsewhere")
        self.x_BSD, self.sums, self.batch, self.rng = x_BSD, sums, batch, rng


def run_stack(
    model: Any,
    x_BSD: Array,
    batch: Batch,
    rng: Array,
    train: bool,
    begin: int = 1,
    source: Any = (),
) -> tuple[Array, dict[str, Array]]:
    """Returns (x_BSD, sums) after all blocks of a module with `cfg`, `prefix`, `repeats` and
    `suffix`.

    The first block is number `begin` of the model, counted from 1. Its number picks the request to
    it, and is folded into its key.

    A pipeline computes the repeats by itself (`run_repeats`). Then `repeats` is a Stop, and Reached
    is raised, or it is a Resume, and the sums are those of the suffix alone.
    """
    cfg = model.cfg
    run = _runner(model, batch, rng, train, begin, Beside(source, shared_of(model)))
    x_BSD, before = run(model.prefix, x_BSD, 0)
    if isinstance(model.repeats, Stop):
        raise Reached(x_BSD, before, batch, rng)
    if isinstance(model.repeats, Resume):
        # What comes before was computed on its way to Stop, and its sums are counted there.
        x_BSD, before, middle = model.repeats.x_BSD, {}, {}
    else:
        x_BSD, middle = _run_repeats(model, run, x_BSD, 0)
    last = len(cfg.prefix) + len(cfg.period) * cfg.repeats
    x_BSD, after = run(model.suffix, x_BSD, last)
    return x_BSD, layout.join_sums(jnp.concatenate, [before, middle, after])


def run_repeats(
    model: Any, x_BSD: Array, batch: Batch, rng: Array, train: bool, first: Array
) -> tuple[Array, dict[str, Array]]:
    """Returns (x_BSD, sums) after the repeats that a module has, which are some of those of its
    config: `first` is the number of the first one, counted from 0.
    """
    return _run_repeats(model, _runner(model, batch, rng, train, 1, NOTHING), x_BSD, first)


def _run_repeats(
    model: Any, run: Callable[..., Any], x_BSD: Array, first: Any
) -> tuple[Array, dict[str, Array]]:
    """Returns (x_BSD, sums) after the repeats, the first of which is number `first` of all."""
    cfg = model.cfg

    def run_period(period, x_BSD, repeat):
        # The number of the period's first block among all blocks of the model.
        number = len(cfg.prefix) + (first + repeat) * len(cfg.period)
        return run(period.blocks, x_BSD, number)

    return layout.run_repeats(run_period, model.repeats, x_BSD, cfg)


def _runner(
    model: Any, batch: Batch, rng: Array, train: bool, begin: int, beside: Beside
) -> Callable[..., Any]:
    """Returns how some blocks of a module are run, a function: (blocks, x_BSD, first) -> (x_BSD,
    sums). The first of them has number `begin` + `first`.
    """
    call = caller(model.cfg, train)

    # Plain Python: only the repeats of `scan` are a loop of the program.
    def run(some, x_BSD, first):
        parts = []
        for i, block in enumerate(some):
            number = jnp.int32(begin) + first + i
            x_BSD, sums = call(block, x_BSD, batch, rng, number, beside)
            parts.append(sums)
        return x_BSD, layout.join_sums(jnp.stack, parts)

    return run


def caller(cfg: ModelConfig, train: bool) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """Returns how a block is called: plainly, or under jax.checkpoint with the policy that the
    config names.
    """

    def call(block, x_BSD, batch, rng, number, beside):
        # Of the number, and not of the place in a loop: scan or not, a block draws the same.
        key = jax.random.fold_in(rng, number)
        return block(x_BSD, of_block(batch, number), key, train, beside)

    if cfg.remat != "none":
        call = jax.checkpoint(call, policy=remat_policy(cfg))
    # Blocks of one kind are traced, differentiated and lowered once, however many there are.
    return jax.jit(call)


def remat_policy(cfg: ModelConfig) -> Callable[..., Any]:
    """Returns which values of a block the backward pass keeps, and where."""
    policies = jax.checkpoint_policies
    if cfg.remat == "full":
        return policies.nothing_saveable
    if cfg.remat == "dots":
        return policies.dots_with_no_batch_dims_saveable
    names = [NAMES[word] for word in cfg.remat.split("+")]
    if not cfg.remat_offload:
        return policies.save_only_these_names(*names)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=names,
        offload_src="device",
        offload_dst="pinned_host",
    )


def of_block(batch: Batch, number: Array) -> Batch:
    """Returns the batch with the request to one block, instead of that to all of them.

    `number` counts blocks from 1.
    """

    def one(z):
        return jax.lax.dynamic_index_in_dim(z, number - 1, keepdims=False)

    return batch._replace(request=jax.tree.map(one, batch.request))


def run_cached(
    model: Any, x_BSD: Array, batch: Batch, caches: list[Any], sources: list[Any]
) -> tuple[Array, list[Any]]:
    """Returns (x_BSD, caches) after all blocks, each with its cache and its cross-attention."""
    # Nothing that is decoded is random but what is drawn of the logits.
    rng = jax.random.fold_in(jax.random.key(0), 0)
    new, shared = [], shared_of(model)

    # As in `caller`: once for all blocks of one kind.
    @jax.jit
    def call(block, x_BSD, cache, beside):
        return block.cached(x_BSD, batch, rng, cache, beside)

    for block, cache, source in zip(layout.blocks_in_order(model), caches, sources, strict=True):
        x_BSD, cache = call(block, x_BSD, cache, Beside(source, shared))
        new.append(cache)
    return x_BSD, new


def empty_caches(cfg: ModelConfig, num_rows: int, num_slots: int) -> list[Any]:
    """Returns caches of `num_slots` tokens that hold none yet, one a block."""
    caches = []
    # Blocks of multi-token prediction decode nothing.
    for kind in cfg.stacks[""].blocks:
        own = cfg.of_block(kind)
        cache = ATTENTIONS[own.attention].caching.empty(own, num_rows, num_slots)
        if is_depth(kind):
            cache = depth.empty_cache(cache, num_rows, num_slots)
        caches.append(cache)
    return caches


def num_slots(caches: list[Any]) -> int:
    """Returns how many tokens of a row caches have room for."""
    return caches[0].num_slots
