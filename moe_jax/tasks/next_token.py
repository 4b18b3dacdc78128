"""The losses of a model that predicts tokens, with the logits of all of them or of some at a time.

Shapes: B rows, S sequence, V vocabulary, T tokens of a device.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.parallel import context, mesh
from moe_jax.schema.config import ModelConfig
from moe_jax.tasks import chunked_loss
from moe_jax.tasks.contract import Losses
from moe_jax.tasks.cross_entropy import negative_log_likelihood

# Logits of a device that are computed at once: 256 MB in float32.
FEW_LOGITS = 2**26
# Logits of a chunk where there are more: 64 MB.
CHUNK_LOGITS = 2**24


def token_losses(
    model: Any, batch: Any, target_BS: Array, counts_BS: Array, rng: Array, train: bool
) -> Losses:
    """Returns the losses of tokens; those where `counts_BS` is false count for nothing.

    `model(batch, rng, train) -> (logits_BSV, sums)`; of a module that also has `hidden` the logits
    need not be whole (models/decoder.py).

    `outputs` are the logits or, where they are too many to exist at once, the likeliest tokens in
    an evaluation and nothing in training.
    """
    # A model that is wrapped in a function, or has a head of its own, gives logits alone.
    cfg = getattr(model, "cfg", None)
    coefficient = cfg.logit_z_loss if cfg and train else 0.0
    cap = cfg.logit_cap if cfg else 0.0
    chunk = 0
    if cfg and hasattr(model, "hidden"):
        chunk = chunk_tokens(cfg, target_BS.size)
    log_sum_BS = None
    if chunk:
        last, sums = model.hidden(batch, rng, train)
        target_BS = _like(target_BS, last.x_BSD)
        nll_BS, log_sum_BS, outputs = chunked_loss.of_hidden(last, target_BS, chunk, not train, cap)
    else:
        outputs, sums = model(batch, rng, train)
        nll_BS = negative_log_likelihood(outputs, _like(target_BS, outputs))
    # Rows that are split over `seq` become whole again, as batches are: one number a token.
    nll_BS = context.whole(nll_BS)
    weight_BS = counts_BS.astype(nll_BS.dtype)
    if not coefficient:
        return Losses(nll_BS, weight_BS, outputs, sums)
    if log_sum_BS is None:
        log_sum_BS = jax.nn.logsumexp(outputs, axis=-1)
    penalty_BS = coefficient * jnp.square(context.whole(log_sum_BS))
    return Losses(nll_BS, weight_BS, outputs, sums, ("logit_z_loss", penalty_BS))


def greedy(outputs: Array) -> Array:
    """Returns the likeliest token of each place [B, S], of what `token_losses` has as outputs."""
    best_BS = outputs if outputs.ndim == 2 else jnp.argmax(outputs, -1)
    return context.whole(best_BS)


def _like(target_BS: Array, outputs: Array) -> Array:
    """Returns targets with the tokens of each row where those of the outputs are."""
    if not context.is_split(outputs):
        return target_BS
    return jax.sharding.reshard(target_BS, context.tokens_spec(outputs))


def chunk_tokens(cfg: ModelConfig, num_tokens: int) -> int:
    """Returns how many tokens of a device have logits at a time; 0 = all of them.

    `num_tokens` of all devices.
    """
    lengths = jax.sharding.get_abstract_mesh().shape
    local_tokens = num_tokens // math.prod(lengths.get(axis, 1) for axis in mesh.FSDP)
    local_vocab = cfg.vocab_size // lengths.get("model", 1)
    chunk = cfg.loss_chunk
    if not chunk and local_tokens * local_vocab > FEW_LOGITS:
        chunk = max(1, CHUNK_LOGITS // local_vocab)
    return chunk if chunk < local_tokens else 0
