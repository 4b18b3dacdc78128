"""The losses of a model that predicts tokens, with the logits of all of them or of some at a time.

Shapes: B rows, S sequence, V vocabulary, T tokens of a device.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.models import mtp
from moe_jax.models.ends import Hidden, logits
from moe_jax.parallel import context, mesh
from moe_jax.schema.config import ModelConfig
from moe_jax.tasks import chunked_loss
from moe_jax.tasks.contract import Further, Losses
from moe_jax.tasks.cross_entropy import negative_log_likelihood

# Logits of a device that are computed at once: 256 MB in float32.
FEW_LOGITS = 2**26
# Logits of a chunk where there are more: 64 MB.
CHUNK_LOGITS = 2**24


class Predicted(NamedTuple):
    """What is known of the predictions of one head."""

    # Of every target [B, S], of whole rows.
    nll_BS: Array
    # log(Z), Z the denominator of the softmax; None where it was not needed.
    log_sum_BS: Array | None
    # Logits or, where they are too many to exist at once, the likeliest tokens in an evaluation and
    # nothing in training.
    outputs: Any


def token_losses(
    model: Any, batch: Any, target_BS: Array, counts_BS: Array, rng: Array, train: bool
) -> Losses:
    """Returns the losses of tokens; those where `counts_BS` is false count for nothing.

    `model(batch, rng, train) -> (logits_BSV, sums)`; of a module that also has `hidden` the logits
    need not be whole (models/decoder.py), and it may predict further tokens (models/mtp.py).
    """
    # A model that is wrapped in a function, or has a head of its own, gives logits alone.
    cfg = getattr(model, "cfg", None)
    coefficient = cfg.logit_z_loss if cfg and train else 0.0
    further: dict[str, Further] = {}
    if cfg and hasattr(model, "hidden"):
        last, sums = model.hidden(batch, rng, train)
        next_one = _of_hidden(last, target_BS, cfg, train)
        further = _further(last, batch.segment_BS, target_BS, counts_BS, cfg, train)
    else:
        outputs, sums = model(batch, rng, train)
        next_one = _of_logits(outputs, target_BS)
    nll_BS, log_sum_BS, outputs = next_one
    weight_BS = counts_BS.astype(nll_BS.dtype)
    penalty: tuple[()] | tuple[str, Array] = ()
    if coefficient:
        if log_sum_BS is None:
            log_sum_BS = jax.nn.logsumexp(outputs, axis=-1)
        penalty = ("logit_z_loss", coefficient * jnp.square(context.whole(log_sum_BS)))
    return Losses(nll_BS, weight_BS, outputs, sums, penalty, further)


def _further(
    last: Hidden, segment_BS: Array, target_BS: Array, counts_BS: Array, cfg: Any, train: bool
) -> dict[str, Further]:
    """Returns the losses of the depths of multi-token prediction, by their names."""
    made = {}
    for k, x_BSD in enumerate(last.further, start=1):
        own_target_BS = mtp.ahead(target_BS, k)
        predicted = _of_hidden(last._replace(x_BSD=x_BSD), own_target_BS, cfg, train)
        nll_BS = predicted.nll_BS
        # The place of its target is in the same document, and is learned.
        counts_here_BS = mtp.continues(segment_BS, k) & mtp.ahead(counts_BS, k)
        correct: Any = () if train else greedy(predicted.outputs) == own_target_BS
        coefficient = cfg.kind_options.mtp_weight / len(last.further)
        weight_BS = counts_here_BS.astype(nll_BS.dtype)
        made[f"{mtp.NAME}_{k}"] = Further(nll_BS, weight_BS, correct, coefficient)
    return made


def _of_hidden(last: Hidden, target_BS: Array, cfg: ModelConfig, train: bool) -> Predicted:
    """Returns what one head predicts, in chunks of tokens where their logits are many."""
    chunk = chunk_tokens(cfg, target_BS.size)
    if not chunk:
        return _of_logits(logits(last, cfg.logit_cap), target_BS)
    target_BS = _like(target_BS, last.x_BSD)
    nll_BS, log_sum_BS, outputs = chunked_loss.of_hidden(
        last, target_BS, chunk, not train, cfg.logit_cap
    )
    return Predicted(context.whole(nll_BS), log_sum_BS, outputs)


def _of_logits(outputs: Array, target_BS: Array) -> Predicted:
    """Returns what logits predict."""
    nll_BS = negative_log_likelihood(outputs, _like(target_BS, outputs))
    # Rows that are split over `seq` become whole again, as batches are: one number a token.
    return Predicted(context.whole(nll_BS), None, outputs)


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
