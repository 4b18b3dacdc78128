"""Parameters and FLOPs of the models that are no decoder, from what a decoder with the same blocks
has.

A token is a place of a row, as in the data: of an encoder-decoder a place of the target, with a
place of the source beside it; of mmoe one of the L input features. What a row computes once (a
head, a tower) is divided by its places.

`decoder` is flops.parameters or flops.forward_per_token (plan/flops), which count a decoder.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.attentions.heads import SINKS
from moe_jax.schema.config import ModelConfig
from moe_jax.weights import Weight

Decoder = Callable[..., Any]


class Projections(NamedTuple):
    """The numbers of parameters of an attention, by kind."""

    # Each takes one multiply-add per token.
    matrices: int
    # And sinks, one number of a head each.
    biases: int
    # Of the norms of queries and keys.
    scales: int


def projections(weights: Mapping[str, Weight]) -> Projections:
    """Returns how many parameters the weights of an attention are."""
    matrices, biases, scales = 0, 0, 0
    for name, weight in weights.items():
        size = math.prod(weight.shape)
        if name.endswith("norm_scale"):
            scales += size
        elif name.endswith("bias") or name == SINKS:
            biases += size
        else:
            matrices += size
    return Projections(matrices, biases, scales)


def norms_of_part(cfg: ModelConfig) -> int:
    """Returns how many norms a part of a block has: attention, or a feed-forward."""
    return 2 if cfg.norm_position == "both" else 1


def full(cfg: ModelConfig, num_keys: int) -> int:
    """Returns the FLOPs of scores and of weights times values, of a query that sees all keys, over
    the blocks (depth blocks counted whole).
    """
    widths = [sum(ATTENTIONS[name].widths(cfg.with_attention(name))) for name in cfg.attentions]
    return 2 * cfg.num_heads * num_keys * sum(widths)


def crossed(cfg: ModelConfig, num_keys: int) -> int:
    """Returns the same of cross-attention, whose heads are ordinary ones, one in each block."""
    # Two products of 2 FLOPs for each number of a key.
    return len(cfg.blocks) * 4 * cfg.num_heads * cfg.head_dim * num_keys


def added(a: Any, b: Any) -> Any:
    """Returns the sums of two counts, field by field."""
    sums = (x + y for x, y in zip(a, b, strict=True))
    return type(a)(*sums)
