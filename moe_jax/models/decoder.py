"""The decoder: embedding, a stack of blocks (prefix, period x repeats, suffix), final norm, head.
Global view.

The other models that have blocks have the same ones, with another mask, cross-attention in the
middle, or no attention at all.

Shapes: B rows, S sequence, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax import Array

from moe_jax.models.block import Look
from moe_jax.models.contract import Kind
from moe_jax.models.ends import (
    Hidden,
    embed,
    embedding,
    hidden,
    logits,
    norm_scale,
    output_head,
    unembed,
)
from moe_jax.models.layers import dropout
from moe_jax.models.stack import run_cached, run_stack, share, stack
from moe_jax.moe.layer import Batch
from moe_jax.parallel import context
from moe_jax.schema.blocks import KindOptions
from moe_jax.schema.config import ModelConfig
from moe_jax.schema.options import option
from moe_jax.weights import Weights

NAME = "decoder"


@dataclasses.dataclass(frozen=True)
class Options(KindOptions):
    bidirectional_prefix: bool = option(
        False, "a row's prefix (the source of a translation) sees all of itself"
    )

    @property
    def masks(self) -> tuple[str, ...]:
        """Returns the mask of the one stack."""
        return ("prefix",) if self.bidirectional_prefix else ("causal",)


class Decoder(nnx.Module):
    """`model(batch, rng, train) -> (logits_BSV, sums)`; `model.hidden(batch, rng, train) ->
    (Hidden, sums)`; `model.cached(batch, caches) -> (logits_BSV, caches)`.
    """

    repeats: Any

    def __init__(self, key: Array, cfg: ModelConfig):
        self.cfg = cfg
        keys = jax.random.split(key, 4)
        ends = {"embed": embedding(cfg, cfg.tie_embeddings), "norm_scale": norm_scale(cfg)}
        if not cfg.tie_embeddings:
            ends["head"] = output_head(cfg)
        self.ends = Weights(keys[0], ends, cfg.param_dtype)
        (mask,) = cfg.kind_options.masks
        self.prefix, self.repeats, self.suffix = stack(keys[1:], cfg, Look(mask))
        share(self, key)

    def __call__(self, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        last, sums = self.hidden(batch, rng, train)
        return logits(last), sums

    def hidden(self, batch: Batch, rng: Array, train: bool) -> tuple[Hidden, dict[str, Array]]:
        """Returns what logits are made of, for a loss that never has all of them."""
        cfg = self.cfg
        # What is known of tokens stays whole; the tokens themselves are split over `seq`.
        x_BSD = embed(self.ends["embed"], context.enter(batch.id_BS), cfg)
        # The key of number 0: blocks are counted from 1.
        key = jax.random.fold_in(rng, 0)
        x_BSD = dropout(x_BSD, cfg.dropout if train else 0.0, key, batch.row_B)
        x_BSD, sums = run_stack(self, x_BSD, batch, rng, train)
        return hidden(self.ends, context.leave(x_BSD), cfg), sums

    def cached(self, batch: Batch, caches: list[Any]) -> tuple[Array, list[Any]]:
        """Returns logits of the tokens of `batch`, which follow those in the caches (one a block,
        in order), and the caches with them. Loop layout only.
        """
        x_BSD = embed(self.ends["embed"], batch.id_BS, self.cfg)
        sources = [()] * len(caches)
        x_BSD, new = run_cached(self, x_BSD, batch, caches, sources)
        return unembed(self.ends, x_BSD, self.cfg), new


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
    splits_rows=True,
    why_silent=why_silent,
    instruments=True,
)
