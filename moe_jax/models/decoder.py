"""The decoder: embedding, a stack of blocks (prefix, period x repeats, suffix), final norm, head.
Global view.

The other models that have blocks have the same ones, with another mask, cross-attention in the
middle, or no attention at all.

Shapes: B rows, S sequence, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax import layout
from moe_jax.models import mtp
from moe_jax.models.block import Beside, Look
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
from moe_jax.models.stack import run_cached, run_stack, share, shared_of, stack
from moe_jax.moe.layer import Batch
from moe_jax.parallel import context
from moe_jax.schema.blocks import KindOptions, Stack, is_depth
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.schema.options import COUNT, NOT_NEGATIVE, option, typed_options
from moe_jax.weights import Weights

NAME = "decoder"


@dataclasses.dataclass(frozen=True)
class Options(KindOptions):
    bidirectional_prefix: bool = option(
        False, "a row's prefix (the source of a translation) sees all of itself"
    )
    mtp_depths: int = option(
        0,
        "tokens behind the next one that are learned too, each by a block of its own "
        "(DeepSeek-V3, arXiv:2412.19437, section 2.2); 0 = off",
        COUNT,
    )
    mtp_weight: float = option(
        0.3, "of the mean of their losses, beside that of the next token", NOT_NEGATIVE
    )

    @property
    def masks(self) -> tuple[str, ...]:
        """Returns the mask of the one stack."""
        return ("prefix",) if self.bidirectional_prefix else ("causal",)

    def stacks(self, own: Stack) -> dict[str, Stack]:
        """Returns the one stack, and the blocks of multi-token prediction behind it."""
        if not self.mtp_depths:
            return {"": own}
        return {"": own, mtp.NAME: mtp.stack(own, self.mtp_depths)}


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
        options = typed_options(Options, cfg.kind_options)
        # One stack, so one mask.
        (mask,) = options.masks
        # Multi-token prediction changes no first value of the model.
        alone = mtp.without(cfg)
        self.prefix, self.repeats, self.suffix = stack(keys[1:], alone, Look(mask))
        share(self, key)
        if options.mtp_depths:
            self.mtp = mtp.Modules(jax.random.fold_in(key, 4), cfg, Look(mask))

    def __call__(self, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        last, sums = self.hidden(batch, rng, train)
        return logits(last, self.cfg.logit_cap), sums

    def hidden(self, batch: Batch, rng: Array, train: bool) -> tuple[Hidden, dict[str, Array]]:
        """Returns what logits are made of, for a loss that never has all of them."""
        cfg = self.cfg
        # What is known of tokens stays whole; the tokens themselves are split over `seq`.
        x_BSD = embed(self.ends["embed"], context.enter(batch.id_BS), cfg)
        # The key of number 0: blocks are counted from 1.
        key = jax.random.fold_in(rng, 0)
        x_BSD = dropout(x_BSD, cfg.dropout if train else 0.0, key, batch.row_B)
        x_BSD, sums = run_stack(self, x_BSD, batch, rng, train)
        last = hidden(self.ends, x_BSD, cfg)
        further: list[Array] = []
        if hasattr(self, "mtp"):
            beside = Beside(shared=shared_of(self))
            table_VD = self.ends["embed"]
            further, more = self.mtp(last.x_BSD, table_VD, batch, rng, train, beside)
            sums = layout.join_sums(jnp.concatenate, [sums, more])
        in_turn = [context.leave(x_BSD) for x_BSD in (last.x_BSD, *further)]
        return Hidden(in_turn[0], last.head_DV, tuple(in_turn[1:])), sums

    def cached(self, batch: Batch, caches: list[Any]) -> tuple[Array, list[Any]]:
        """Returns logits of the tokens of `batch`, which follow those in the caches (one a block,
        in order), and the caches with them. Loop layout only.
        """
        x_BSD = embed(self.ends["embed"], batch.id_BS, self.cfg)
        # No block of a decoder attends to another row.
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


def refusals(cfg: Config) -> Iterator[str]:
    """Yields what does not go with multi-token prediction."""
    options, model = typed_options(Options, cfg.model.kind_options), cfg.model
    at = "model.kinds.decoder"
    if not options.mtp_depths:
        if options.mtp_weight != Options().mtp_weight:
            yield (
                f"{at}.mtp_weight = {options.mtp_weight} does nothing, because {at}.mtp_depths is "
                f"0: set {at}.mtp_depths=1, or leave the key alone"
            )
        return
    depths = f"{at}.mtp_depths ({options.mtp_depths})"
    if options.mtp_depths >= cfg.data.seq_len:
        yield (
            f"{depths} must be below data.seq_len ({cfg.data.seq_len}): a row has no token so far "
            "ahead"
        )
    if options.bidirectional_prefix:
        yield (
            f"{depths} must be 0 with {at}.bidirectional_prefix = True: a token that sees its "
            "whole prefix sees what it is to predict"
        )
    if model.blocks and is_depth(model.blocks[-1]):
        yield (
            f'{depths} needs a last block that all tokens go through, and it is "'
            f'{model.blocks[-1]}": end model.suffix with another block'
        )


def small(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Yields few further tokens."""
    del seq_len
    yield "mtp_depths", min(options["mtp_depths"], 2)


KIND = Kind(
    Options,
    Decoder,
    causal=True,
    parameters=None,
    forward_flops=None,
    writes_text=True,
    caps_logits=True,
    splits_rows=True,
    why_silent=why_silent,
    instruments=True,
    small=small,
    refusals=refusals,
)
