"""The encoder-decoder: a source row in, a target row out, mixtures of experts in both (Vaswani et
al. 2017, arXiv:1706.03762).

    source tokens -> embedding -> blocks with attention to the whole source -> norm target tokens ->
    the same embedding -> blocks with causal attention, then cross-attention to the source, then the
    feed-forward -> norm -> head

Blocks are those of the decoder (models/decoder.py); the encoder's pattern is
model.kinds.encdec.encoder_*, the decoder's that of any model. A target token sees no later one, so
the model is causal in its targets; a row without source is a language model's. Sums of the layers
are those of the encoder's, then those of the decoder's.

Shapes: B rows, S target sequence, T source sequence, D model, V vocabulary, M length of the cache.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe_jax.layout import blocks_in_order, join_sums
from moe_jax.models import encoder
from moe_jax.models.attention import Memory
from moe_jax.models.attentions.heads import projections as cross_weights
from moe_jax.models.block import Look, Source, kind_refusals
from moe_jax.models.contract import Kind
from moe_jax.models.counting import (
    Decoder,
    Projections,
    added,
    crossed,
    full,
    norms_of_part,
    projections,
)
from moe_jax.models.decoder import as_decoder
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
from moe_jax.models.layers import dropout, norm
from moe_jax.models.stack import run_cached, run_stack, share, stack
from moe_jax.moe.layer import Batch
from moe_jax.schema.blocks import KindOptions, Stack
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.schema.options import COUNT, option
from moe_jax.weights import Weights

NAME = "encdec"


@dataclasses.dataclass(frozen=True)
class Options(KindOptions):
    encoder_prefix: tuple[str, ...] = option((), "blocks before the encoder's period")
    encoder_period: tuple[str, ...] = option(("moe",), "blocks repeated `encoder_repeats` times")
    encoder_repeats: int = option(4, "of the encoder's period", COUNT)
    encoder_suffix: tuple[str, ...] = option((), "blocks after the encoder's last period")

    @property
    def masks(self) -> tuple[str, ...]:
        """Returns the mask of the encoder, then that of the decoder."""
        return ("full", "causal")

    @property
    def of_blocks(self) -> tuple[str, ...]:
        """Returns the names of the keys of the encoder's blocks."""
        return tuple(f"encoder_{part}" for part in Stack._fields)

    def stacks(self, own: Stack) -> dict[str, Stack]:
        """Returns the stack of the encoder, then that of the decoder."""
        encoder = Stack(
            self.encoder_prefix, self.encoder_period, self.encoder_repeats, self.encoder_suffix
        )
        return {"encoder": encoder, "": own}


def encoder_config(cfg: ModelConfig) -> ModelConfig:
    """Returns the encoder's stack as a model of its own: its blocks, all else as in `cfg`."""
    stack = cfg.stacks["encoder"]._asdict()
    return dataclasses.replace(cfg, kind=encoder.NAME, kind_options=encoder.Options(), **stack)


class SourceStack(nnx.Module):
    """The encoder: blocks and the norm after them."""

    repeats: Any

    def __init__(self, key: Array, cfg: ModelConfig):
        self.cfg = cfg
        keys = jax.random.split(key, 4)
        self.ends = Weights(keys[0], {"norm_scale": norm_scale(cfg)}, cfg.param_dtype)
        self.prefix, self.repeats, self.suffix = stack(keys[1:], cfg, Look("full"))
        share(self, key)


class EncDec(nnx.Module):
    """`model(batch, rng, train) -> (logits_BSV, sums)`, where `batch.source_rows` is a Batch;
    `model.hidden(batch, rng, train) -> (Hidden, sums)`.

    A recording is not replayed in the encoder.
    """

    repeats: Any

    def __init__(self, key: Array, cfg: ModelConfig):
        self.cfg = as_decoder(cfg)
        # The ends, three parts of the decoder's stack, the encoder.
        keys = jax.random.split(key, 5)
        ends = {"embed": embedding(cfg), "norm_scale": norm_scale(cfg)}
        if not cfg.tie_embeddings:
            ends["head"] = output_head(cfg)
        self.ends = Weights(keys[0], ends, cfg.param_dtype)
        look = Look("causal", cross=True)
        self.prefix, self.repeats, self.suffix = stack(keys[1:4], self.cfg, look)
        share(self, key)
        self.encoder = SourceStack(keys[4], encoder_config(cfg))

    def __call__(self, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        last, sums = self.hidden(batch, rng, train)
        return logits(last, self.cfg.logit_cap), sums

    def hidden(self, batch: Batch, rng: Array, train: bool) -> tuple[Hidden, dict[str, Array]]:
        """Returns what logits are made of, for a loss that never has all of them."""
        # A recording is of target rows.
        request = batch.request._replace(recorded=())
        source_rows = batch.source_rows._replace(request=request)
        source, before = self.encode(source_rows, rng, train)
        # Number 0 is that of both embeddings; the source has the key without the 1.
        key = jax.random.fold_in(jax.random.fold_in(rng, 0), 1)
        x_BSD = self._embed(batch, key, train)
        # Blocks read the source as it was encoded.
        targets = batch._replace(source_rows=())
        # Blocks are counted through: those of the encoder are the first.
        begin = 1 + len(self.encoder.cfg.blocks)
        x_BSD, after = run_stack(self, x_BSD, targets, rng, train, begin, source)
        sums = join_sums(jnp.concatenate, [before, after])
        return hidden(self.ends, x_BSD, self.cfg), sums

    def encode(self, batch: Batch, rng: Array, train: bool) -> tuple[Source, dict[str, Array]]:
        """Returns (what cross-attention reads, sums) of the source rows."""
        x_BTD = self._embed(batch, jax.random.fold_in(rng, 0), train)
        x_BTD, sums = run_stack(self.encoder, x_BTD, batch, rng, train)
        x_BTD = norm(x_BTD, self.encoder.ends["norm_scale"], self.cfg)
        return Source(x_BTD, batch.segment_BS), sums

    def memories(self, source: Source) -> list[Memory]:
        """Returns keys and values of the source for every block's cross-attention.

        Loop layout only, as `cached`.
        """
        return [block.remember(source) for block in blocks_in_order(self)]

    def cached(
        self, batch: Batch, caches: list[Any], memories: list[Memory]
    ) -> tuple[Array, list[Any]]:
        """Returns logits of the target tokens of `batch`, which follow those in the caches, and the
        caches with them.
        """
        x_BSD = embed(self.ends["embed"], batch.id_BS, self.cfg)
        x_BSD, new = run_cached(self, x_BSD, batch, caches, memories)
        return unembed(self.ends, x_BSD, self.cfg), new

    def _embed(self, batch: Batch, key: Array, train: bool) -> Array:
        x_BSD = embed(self.ends["embed"], batch.id_BS, self.cfg)
        return dropout(x_BSD, self.cfg.dropout if train else 0.0, key, batch.row_B)


def parameters(cfg: ModelConfig, decoder: Decoder) -> Any:
    """Returns the Counts of an encoder-decoder."""
    target = decoder(as_decoder(cfg))
    source = decoder(as_decoder(encoder_config(cfg)))
    # One embedding serves both.
    both = added(target, source._replace(embedding=0, head=0))
    number, cross = crossing(cfg)
    return both._replace(
        attention=both.attention + number * (cross.matrices + cross.biases),
        # A block has a part more, its cross-attention.
        norms=both.norms + number * (norms_of_part(cfg) * cfg.d_model + cross.scales),
    )


def forward_flops(cfg: ModelConfig, seq_len: int, decoder: Decoder) -> Any:
    """Returns the Breakdown of an encoder-decoder's forward pass."""
    encoder = as_decoder(encoder_config(cfg))
    target = decoder(as_decoder(cfg), seq_len)
    source = decoder(encoder, seq_len)
    # The encoder has no head, and every token of it sees the whole row.
    both = added(target, source._replace(head=0, attention_scores=full(encoder, seq_len)))
    number, cross = crossing(cfg)
    return both._replace(
        # The source has a place for each of the target, so keys and values cost as much.
        attention_projections=both.attention_projections + 2 * number * cross.matrices,
        attention_scores=both.attention_scores + crossed(as_decoder(cfg), seq_len),
    )


def crossing(cfg: ModelConfig) -> tuple[int, Projections]:
    """Returns (blocks with cross-attention, the parameters of that in one of them)."""
    return len(as_decoder(cfg).blocks), projections(cross_weights(cfg))


def refusals(cfg: Config) -> Iterator[str]:
    """Refuses unknown blocks in either part, and a part without any."""
    model = cfg.model
    for part in ("prefix", "period", "suffix"):
        for block in getattr(model.kind_options, f"encoder_{part}"):
            yield from kind_refusals(f"model.kinds.encdec.encoder_{part}", block)
    # model.blocks are those of both stacks: where the decoder has all of them, the encoder has
    # none.
    own = model.prefix + model.period * model.repeats + model.suffix
    if not own or len(own) == len(model.blocks):
        yield (
            "an encoder-decoder needs a block in both: model.prefix, model.period x model.repeats "
            "and model.suffix are its decoder's, model.kinds.encdec.encoder_* its encoder's"
        )


def small(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Yields few blocks of the encoder."""
    del seq_len
    yield "encoder_repeats", min(options["encoder_repeats"], 2)


def random_inputs(
    options: Options, vocab_size: int, shape: tuple[int, int], rng: np.random.Generator
) -> dict[str, Any]:
    """Returns the Batch of the sources, one document in each row."""
    del options
    position_BS = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    id_BS = rng.integers(0, vocab_size, shape).astype(np.int32)
    row_B = np.arange(shape[0], dtype=np.int32)
    source = Batch(
        id_BS=id_BS,
        position_BS=position_BS,
        segment_BS=np.ones_like(position_BS),
        row_B=row_B,
    )
    return {"source_rows": source}


KIND = Kind(
    Options,
    EncDec,
    causal=True,
    parameters=parameters,
    forward_flops=forward_flops,
    writes_text=False,
    caps_logits=True,
    refusals=refusals,
    small=small,
    random_inputs=random_inputs,
)
