"""The encoder-decoder: a source row in, a target row out, mixtures of experts in both (Vaswani et al. 2017, arXiv:1706.03762).

    source tokens -> embedding -> blocks with attention to the whole source -> norm
    target tokens -> the same embedding -> blocks with causal attention, then cross-attention to the source, then the feed-forward
    -> norm -> head

Blocks are those of the decoder (models/decoder.py); the encoder's pattern is model.kinds.encdec.encoder_*, the decoder's that of any model.
A target token sees no later one, so the model is causal in its targets; a row without source is a language model's.
Sums of the layers are those of the encoder's, then those of the decoder's.

Shapes: B rows, S target sequence, T source sequence, D model, V vocabulary, M length of the cache.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.models.attention import Memory
from moe_jax.models.decoder import (
    Context,
    Look,
    Source,
    by_name,
    embed,
    embedding,
    in_order,
    output_head,
    run_cached,
    run_stack,
    stack,
    unembed,
)
from moe_jax.models.layers import dropout, rms_norm
from moe_jax.moe.layer import Batch
from moe_jax.weights import Weight, Weights


def encoder_config(cfg: ModelConfig) -> ModelConfig:
    """The encoder's stack as a model of its own: the pattern of its blocks, everything else as in `cfg`."""
    parts = {name: cfg.kind_options[f"encoder_{name}"] for name in ("prefix", "period", "repeats", "suffix")}
    return dataclasses.replace(cfg, kind="encoder", **parts)


def decoder_config(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, kind="decoder")


class SourceStack(nnx.Module):
    """The encoder: blocks and the norm after them."""

    repeats: Any

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        self.cfg = cfg
        keys = jax.random.split(key, 4)
        self.ends = Weights(keys[0], {"norm_scale": Weight((cfg.d_model,), (None,), 0.0, 1.0)}, cfg.param_dtype)
        self.prefix, self.repeats, self.suffix = stack(keys[1:], cfg, Look("full"))


class EncDec(nnx.Module):
    """`model(batch, rng, train) -> (logits_BSV, sums)`, where `batch.inputs` is the Batch of the source rows."""

    repeats: Any

    def __init__(self, key: jax.Array, cfg: ModelConfig):
        self.cfg = decoder_config(cfg)
        keys = jax.random.split(key, 5)
        ends = {"embed": embedding(cfg), "norm_scale": Weight((cfg.d_model,), (None,), 0.0, 1.0)}
        if not cfg.tie_embeddings:
            ends["head"] = output_head(cfg)
        self.ends = Weights(keys[0], ends, cfg.param_dtype)
        self.prefix, self.repeats, self.suffix = stack(keys[1:4], self.cfg, Look("causal", cross=True))
        self.encoder = SourceStack(keys[4], encoder_config(cfg))

    def __call__(self, batch: Batch, rng: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        told = {name: getattr(batch, name) for name in ("removed_BE", "barred_BE", "record")}
        source, before = self.encode(batch.inputs._replace(**told), rng, train)
        index = jnp.int32(1 + len(self.encoder.cfg.blocks))
        x = self._embed(batch, jax.random.fold_in(jax.random.fold_in(rng, 0), 1), train)
        x, after = run_stack(self, x, Context(batch._replace(inputs=()), rng, index, source), train)
        return unembed(self.ends, x, self.cfg), by_name(jnp.concatenate, [before, after])

    def encode(self, batch: Batch, rng: jax.Array, train: bool) -> tuple[Source, dict[str, jax.Array]]:
        """(what cross-attention reads, sums) of the source rows."""
        x = self._embed(batch, jax.random.fold_in(rng, 0), train)
        x, sums = run_stack(self.encoder, x, Context(batch, rng, jnp.int32(1)), train)
        x = rms_norm(x, self.encoder.ends["norm_scale"], self.cfg.norm_epsilon)
        return Source(x, batch.segment_BS), sums

    def memories(self, source: Source) -> list[Memory]:
        """Keys and values of the source for every block's cross-attention. Loop layout only, as `cached`."""
        return [block.remember(source) for block in in_order(self)]

    def cached(self, batch: Batch, caches: list[Any], memories: list[Memory]) -> tuple[jax.Array, list[Any]]:
        """Logits of the target tokens of `batch`, which follow those in the caches, and the caches with them."""
        x, new = run_cached(self, embed(self.ends["embed"], batch.id_BS, self.cfg), batch, caches, memories)
        return unembed(self.ends, x, self.cfg), new

    def _embed(self, batch: Batch, key: jax.Array, train: bool) -> jax.Array:
        x = embed(self.ends["embed"], batch.id_BS, self.cfg)
        return dropout(x, self.cfg.dropout if train else 0.0, key, batch.row_B)
