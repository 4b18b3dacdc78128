"""What stands before the first block of a model and after its last one: embedding, norm and head.

Shapes: B rows, S sequence, D model, V vocabulary.
"""

from typing import NamedTuple

import jax
from jax import Array

from moe_jax.models.layers import gather, linear, norm, scale_of_norm
from moe_jax.models.soft_cap import lean_soft_cap
from moe_jax.parallel import context
from moe_jax.precision import wide_dtype
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weight, Weights

# Standard deviation of the first logits. 1 costs half a nat at the first step, and of a tied head
# five nats; 0 would give no gradient to anything but the head there, so that a proof at the first
# step would prove nothing (docs/first_values.md).
FIRST_LOGITS = 0.1


def embedding(cfg: ModelConfig, tied: bool = False) -> Weight:
    """Returns the embedding [V, D].

    `tied`: it is the head, too, and begins as small as a head does.

    The logit of the token itself would otherwise be about sqrt(D): a guess that every token
    repeats.
    """
    if tied:
        std = FIRST_LOGITS * cfg.d_model**-0.5
    else:
        std = 1 / cfg.embedding_scale if cfg.embedding_scale else cfg.d_model**-0.5
    return Weight((cfg.vocab_size, cfg.d_model), ("vocab", "embed"), std)


def norm_scale(cfg: ModelConfig) -> Weight:
    """Returns the scale of an RMSNorm of the residual stream [D]."""
    return scale_of_norm((cfg.d_model,), (None,), cfg)


def output_head(cfg: ModelConfig) -> Weight:
    """Returns the head [D, V], drawn so that first logits have standard deviation FIRST_LOGITS."""
    std = FIRST_LOGITS * cfg.d_model**-0.5
    return Weight((cfg.d_model, cfg.vocab_size), ("embed", "vocab"), std)


def embed(table_VD: Array, id_BS: Array, cfg: ModelConfig) -> Array:
    """Returns the embeddings of tokens [B, S, D], which begin with a root mean square of one where
    they are not tied.
    """
    table_VD = gather(table_VD, ("vocab", "embed"), cfg.dtype)
    x_BSD = table_VD.at[id_BS].get(out_sharding=context.tokens_spec(id_BS, None))
    return x_BSD * embedding_scale(cfg)


def embedding_scale(cfg: ModelConfig) -> float:
    """Returns the factor on the embeddings of tokens."""
    return cfg.embedding_scale or cfg.d_model**0.5


class Hidden(NamedTuple):
    """Holds what logits are made of: x @ head, where the vocabulary may be split over `model`.

    Of a model with model.logit_cap they are that under a soft cap.
    """

    x_BSD: Array
    head_DV: Array
    # Likewise x of each depth of multi-token prediction (models/mtp.py).
    further: tuple[Array, ...] = ()


def hidden(ends: Weights, x_BSD: Array, cfg: ModelConfig) -> Hidden:
    """Returns the tokens after the final norm, and the head."""
    x_BSD = before_head(x_BSD, ends["norm_scale"], cfg)
    if cfg.tie_embeddings:
        head_DV = gather(ends["embed"], ("vocab", "embed"), cfg.dtype).T
    else:
        head_DV = gather(ends["head"], ("embed", "vocab"), cfg.dtype)
    return Hidden(x_BSD, head_DV)


def before_head(x_BSD: Array, scale_D: Array, cfg: ModelConfig) -> Array:
    """Returns what a head reads: the tokens after a norm of this scale, times model.head_scale."""
    x_BSD = norm(x_BSD, scale_D, cfg)
    return x_BSD if cfg.head_scale == 1 else x_BSD * cfg.head_scale


def logits(last: Hidden, cap: float) -> Array:
    """Returns logits [B, S, V] in at least float32, under a soft cap; cap = 0: no cap."""
    with jax.named_scope("head"):
        logits_BSV = linear(last.x_BSD, last.head_DV, wide_dtype(last.x_BSD.dtype))
        return lean_soft_cap(logits_BSV, cap) if cap else logits_BSV


def unembed(ends: Weights, x_BSD: Array, cfg: ModelConfig) -> Array:
    """Returns logits in at least float32: the final norm, the head and its soft cap."""
    return logits(hidden(ends, x_BSD, cfg), cfg.logit_cap)
