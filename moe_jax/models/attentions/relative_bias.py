"""Attention with the relative position bias of T5 (Raffel et al. 2019, arXiv:1910.10683, section
2.1): grouped-query attention without rotary embeddings, whose scores get a learned number of each
head, by the distance of the two tokens (models/attention_bias.py).

The blocks of a stack share the numbers: one table [buckets, heads] in an encoder, one in a decoder.
T5 does not divide scores by the root of a head's width either, which is model.attention_scale=1.

The FLOPs of the bias are not counted: it takes no products.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jax import Array

from moe_jax.models.attention_bias import TABLE, Buckets
from moe_jax.models.attentions import grouped_query, heads
from moe_jax.models.attentions.contract import Attention
from moe_jax.schema.blocks import is_depth
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.schema.options import NUMBER, at_least, option, typed_options
from moe_jax.weights import Weight, Weights

# Keys of rotary embeddings, and their values in a new config.
ROTARY = {
    "rope_theta": 10_000.0,
    "rope_fraction": 1.0,
    "rope_pairs": "halves",
    "rope_scaling": "none",
}


@dataclasses.dataclass(frozen=True)
class Options:
    buckets: int = option(32, "numbers of a head, each of some distances", at_least(4))
    max_distance: int = option(128, "tokens, from which on all distances have one number", NUMBER)


def shared(cfg: ModelConfig) -> dict[str, Weight]:
    """Declares the table [L, H] of a stack, drawn as T5's is in transformers."""
    own = typed_options(Options, cfg.attention_options)
    shape = (own.buckets, cfg.num_heads)
    return {TABLE: Weight(shape, (None, "heads"), cfg.d_model**-0.5)}


def buckets(mask: str, options: Options) -> Buckets:
    """Returns the buckets; later keys have some of them where any are seen."""
    return Buckets(options.buckets, options.max_distance, mask != "causal")


def inputs(
    weights: Weights, x_BSD: Array, position_BS: Array, cfg: ModelConfig
) -> tuple[Array, Array, Array]:
    """(queries, keys, values), none of them turned."""
    del position_BS
    q, k, v = (heads.project(weights, name, x_BSD, cfg) for name in "qkv")
    return q, k, v


def cached_inputs(
    weights: Weights, x_BSD: Array, position_BS: Array, cfg: ModelConfig
) -> tuple[Array, heads.Cache]:
    """(queries, keys and values of the tokens)."""
    q, k, v = inputs(weights, x_BSD, position_BS, cfg)
    return q, heads.Cache(k, v)


def refusals(cfg: Config, name: str) -> Iterator[str]:
    """Refuses what has no meaning beside a bias by distances, and buckets that are too many."""
    model = cfg.model
    yield from heads.uneven_heads(model)
    at = f"model.attentions.{name}"
    own = typed_options(Options, model.with_attention(name).attention_options)
    exact = max(buckets(mask, own).exact for mask in model.kind_options.masks)
    if own.max_distance <= exact:
        yield (
            f"{at}.max_distance ({own.max_distance}) must be above {exact}: with {at}.buckets = "
            f"{own.buckets}, so many distances have a bucket of their own"
        )
    if model.attention_cap:
        yield (
            f"model.attention_cap ({model.attention_cap}) must be 0 with model.attention = "
            f'"{name}": no paper says whether the bias is added before the cap or after it'
        )
    pairs = zip(model.blocks, model.attentions, strict=True)
    if any(is_depth(kind) and attention == name for kind, attention in pairs):
        yield (
            f'model.attention = "{name}" counts tokens that stand side by side, and a depth block '
            "has only some of them: leave depth blocks out, or set model.attention=grouped_query"
        )
    # Other blocks may turn their heads.
    if set(model.attentions) == {name}:
        for key, neutral in ROTARY.items():
            if getattr(model, key) != neutral:
                yield (
                    f"model.{key} = {getattr(model, key)} does nothing, because model.attention = "
                    f'"{name}" has no rotary embeddings: leave the key alone'
                )


def small(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Yields buckets of which a short row needs all kinds."""
    del seq_len
    yield "buckets", min(options["buckets"], 8)
    yield "max_distance", min(options["max_distance"], 6)


ATTENTION = Attention(
    Options,
    heads.weights,
    inputs,
    heads.scale,
    heads.widths,
    ("causal", "full", "prefix"),
    grouped_query.keys,
    sees_future=False,
    caching=heads.CACHING._replace(inputs=cached_inputs),
    slots=grouped_query.slots,
    num_pairs=grouped_query.num_pairs,
    refusals=refusals,
    small=small,
    shared=shared,
    buckets=buckets,
)
