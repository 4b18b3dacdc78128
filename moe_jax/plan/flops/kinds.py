"""Parameters and FLOPs of the models that are no decoder, from what a decoder with the same blocks
has.

A token is a place of a row, as in the data: of an encoder-decoder a place of the target, with a
place of the source beside it; of mmoe one of the L input features. What a row computes once (a
head, a tower) is divided by its places.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.schema.config import ModelConfig

Decoder = Callable[..., Any]  # flops.parameters, or flops.forward_per_token, of a decoder


def as_decoder(cfg: ModelConfig, part: str = "") -> ModelConfig:
    """The blocks of a model, or the `part` of them that its options name "encoder_...", as those of
    a decoder.
    """
    names = ("prefix", "period", "repeats", "suffix") if part else ()
    own = {name: cfg.kind_options[f"{part}{name}"] for name in names}
    return dataclasses.replace(cfg, kind="decoder", **own)


def encoder_parameters(cfg: ModelConfig, decoder: Decoder) -> Any:
    o, d = cfg.kind_options, cfg.d_model
    tokens = o["inputs"] == "tokens"
    entry = cfg.vocab_size * d if tokens else (o["input_dim"] + 1) * d
    return decoder(as_decoder(cfg))._replace(
        embedding=entry + o["learned_positions"] * d, head=(d + 1) * o["num_classes"]
    )


def encoder_flops(cfg: ModelConfig, seq_len: int, decoder: Decoder) -> Any:
    o, d = cfg.kind_options, cfg.d_model
    found = decoder(as_decoder(cfg), seq_len)
    entry = 0 if o["inputs"] == "tokens" else 2 * o["input_dim"] * d
    scores = found.attention_scores if o["attention"] == "causal" else full(cfg, seq_len)
    return found._replace(
        attention_scores=scores, head=entry + round(2 * d * o["num_classes"] / seq_len)
    )


def full(cfg: ModelConfig, num_keys: int) -> int:
    """FLOPs of scores and of weights times values, of a query that sees all keys, over the blocks
    (depth blocks counted whole).
    """
    return len(cfg.blocks) * 4 * cfg.num_heads * cfg.head_dim * num_keys


def cross_weights(cfg: ModelConfig) -> int:
    """Of the projections of cross-attention in the decoder's blocks."""
    return (
        len(as_decoder(cfg).blocks)
        * 2
        * cfg.d_model
        * cfg.head_dim
        * (cfg.num_heads + cfg.num_kv_heads)
    )


def added(a: Any, b: Any) -> Any:
    return type(a)(*(x + y for x, y in zip(a, b, strict=True)))


def encdec_parameters(cfg: ModelConfig, decoder: Decoder) -> Any:
    target, source = decoder(as_decoder(cfg)), decoder(as_decoder(cfg, "encoder_"))
    both = added(target, source._replace(embedding=0, head=0))
    number = len(as_decoder(cfg).blocks)
    biases = cfg.attention_bias * number * (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim
    norms = number * (cfg.d_model + cfg.qk_norm * 2 * cfg.head_dim)
    return both._replace(
        attention=both.attention + cross_weights(cfg) + biases, norms=both.norms + norms
    )


def encdec_flops(cfg: ModelConfig, seq_len: int, decoder: Decoder) -> Any:
    encoder = as_decoder(cfg, "encoder_")
    target, source = decoder(as_decoder(cfg), seq_len), decoder(encoder, seq_len)
    both = added(target, source._replace(head=0, attention_scores=full(encoder, seq_len)))
    scores = both.attention_scores + full(as_decoder(cfg), seq_len)
    return both._replace(
        attention_projections=both.attention_projections + 2 * cross_weights(cfg),
        attention_scores=scores,
    )


def mmoe_parameters(cfg: ModelConfig, decoder: Decoder) -> Any:
    d, items = cfg.d_model, cfg.kind_options["items"]
    found = decoder(as_decoder(cfg))
    return found._replace(
        embedding=cfg.vocab_size * d,
        head=(d + 1) * sum(items),
        attention=0,
        dense=found.dense + d * d + d + len(items) * d * d,  # the bottom and the towers
        norms=3 * d + len(cfg.blocks) * d,
    )


def mmoe_flops(cfg: ModelConfig, seq_len: int, decoder: Decoder) -> Any:
    d, items = cfg.d_model, cfg.kind_options["items"]
    found, num_tasks = decoder(as_decoder(cfg), len(items)), len(items)

    def per_place(of_row):
        return round(of_row / seq_len)

    gates = 2 * d * cfg.moe.num_experts * cfg.num_moe_layers  # of the one gate that a task uses
    return type(found)(
        attention_projections=0,
        attention_scores=0,
        dense=per_place(num_tasks * (found.dense + 2 * d * d) + 2 * d * d)
        + 2 * d,  # the bag adds up its features
        shared=per_place(num_tasks * found.shared),
        experts=per_place(num_tasks * found.experts),
        router=per_place(num_tasks * gates),
        head=per_place(2 * d * sum(items)),
    )


def article_parameters(cfg: ModelConfig, decoder: Decoder) -> Any:
    o, d, found = cfg.kind_options, cfg.d_model, decoder(as_decoder(cfg))
    nothing = type(found)(*(0 for _ in found))
    experts = o["num_experts"] * o["window"]
    return nothing._replace(
        embedding=cfg.vocab_size * d,
        head=d * (o["num_classes"] or cfg.vocab_size),
        experts=experts,
        experts_active=experts,
        router=d * o["num_experts"] if o["aggregate"] == "gated" else 0,
    )


def article_flops(cfg: ModelConfig, seq_len: int, decoder: Decoder) -> Any:
    o, d = cfg.kind_options, cfg.d_model
    rows = (
        seq_len if o["num_classes"] else 1
    )  # a class is asked for once in a row, a token at every place
    num, places = o["num_experts"], min(o["window"], seq_len) if o["num_classes"] else o["window"]
    nothing = type(decoder(as_decoder(cfg), seq_len))(*(0,) * 7)
    gated = o["aggregate"] == "gated"
    return nothing._replace(
        experts=math.ceil(2 * num * places * d / rows),
        router=math.ceil((2 * d * num + 2 * num * d) / rows) if gated else 0,
        head=math.ceil(2 * d * (o["num_classes"] or cfg.vocab_size) / rows),
    )


PARAMETERS: Mapping[str, Callable[..., Any]] = {
    "encoder": encoder_parameters,
    "encdec": encdec_parameters,
    "mmoe": mmoe_parameters,
    "article": article_parameters,
}
FORWARD: Mapping[str, Callable[..., Any]] = {
    "encoder": encoder_flops,
    "encdec": encdec_flops,
    "mmoe": mmoe_flops,
    "article": article_flops,
}
