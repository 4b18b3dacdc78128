"""What a config of ours says of the function that a model computes, in one form.

Two configs with the same meaning make models that compute the same at evaluation: options of
training, of speed and of rounding are left out, options of what is not there too, and what may be
written in two ways is written in one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.models import mtp
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.routing import ROUTERS
from moe_jax.schema.blocks import Stack, without_attention
from moe_jax.schema.config import Config, ModelConfig

# In place of model.prefix, period, repeats and suffix: the kind of every block, in order, without
# its attention, those of an encoder for themselves; and in place of model.attention the attention
# of every block.
BLOCKS, ENCODER_BLOCKS, LAYER_ATTENTIONS = "blocks", "encoder_blocks", "attentions"
# The stack of an encoder, among those of a model.
ENCODER = "encoder"
# By the names of stacks (schema/blocks.py).
BLOCKS_OF = {"": BLOCKS, ENCODER: ENCODER_BLOCKS}
PLAN = ("prefix", "period", "repeats", "suffix")
# Below "model.": of training, of speed, of rounding.
NOT_OF_THE_FUNCTION = (
    *("scan", "remat", "remat_offload", "allow_leak", "dropout", "param_dtype", "dtype"),
    "ffn_numbers",
    *("attention_kernel", "loss_chunk", "logit_z_loss"),
    *("attention", "block_attentions", *PLAN),
)
# Below "model.moe.". A model that is exported drops nothing, as one that is decoded
# (models/decodable.py), unless that is a property of the model; and zeros of a rule are zeros of
# the weights.
NOT_OF_THE_EXPERTS = (
    "group_rows",
    "ordering",
    "dispatcher",
    "losses",
    "adaptive",
    "expert_kernel",
)
# Options of a kind of model, likewise: further tokens are predicted beside the next one.
NOT_OF_THE_KIND = ("mtp_depths", "mtp_weight")


def meaning(cfg: Config) -> dict[str, Any]:
    """Returns {path of a key: value} of all that decides what is computed of the next token."""
    model = mtp.without(cfg.model) if mtp.num_depths(cfg.model) else cfg.model
    values: dict[str, Any] = {LAYER_ATTENTIONS: model.attentions}
    for name, stack in model.stacks.items():
        values[BLOCKS_OF[name]] = tuple(without_attention(kind) for kind in stack.blocks)
    chosen = {
        "kind": ("kinds", model.kind_options),
        "activation": ("activations", model.activation_options),
        "rope_scaling": ("rope_scalings", model.rope_scaling_options),
    }
    for field in dataclasses.fields(ModelConfig):
        name, value = field.name, getattr(model, field.name)
        if name in chosen:
            values[f"model.{name}"] = value
            block, options = chosen[name]
            path = f"model.{block}.{value}"
            values |= _options(path, options)
            for option in (*NOT_OF_THE_KIND, *getattr(options, "of_blocks", ())):
                values.pop(f"{path}.{option}", None)
        elif _is_plain(value) and name not in NOT_OF_THE_FUNCTION:
            values[f"model.{name}"] = value
    for name in dict.fromkeys(model.attentions):
        options = ATTENTIONS[name].normal_form(model.with_attention(name))
        values |= _options(f"model.attentions.{name}", options)
    # 0 stands for it.
    if model.attention_scale == model.head_dim**-0.5:
        values["model.attention_scale"] = 0.0
    values["model.embedding_scale"] = float(model.embedding_scale or model.d_model**0.5)
    if not model.qk_norm:
        del values["model.qk_norm_over"]
    if not model.num_dense_layers:
        del values["model.ffn_hidden"]
    if model.num_depth_blocks:
        values |= _options("model.depth", model.depth)
    if model.num_moe_layers:
        values |= _of_experts(model)
    return values


def _of_experts(model: ModelConfig) -> dict[str, Any]:
    """Returns what the keys below model.moe decide."""
    moe = model.moe
    values: dict[str, Any] = {
        "model.moe.num_experts": moe.num_experts,
        "model.moe.expert_hidden": moe.expert_hidden,
        "model.moe.latent_dim": moe.latent_dim,
        # n of width F are one of width n F.
        "model.moe.shared_experts": min(moe.shared_experts, 1),
        "model.moe.shared_hidden": moe.shared_width,
        "model.moe.shared_gate": moe.shared_gate,
        "model.moe.sparse.stored.block": moe.sparse.stored.block,
        "model.moe.router": moe.router,
    }
    if DISPATCHERS[moe.dispatcher].of_the_model(moe.dispatcher_options):
        values["model.moe.dispatcher"] = moe.dispatcher
        values |= _options(f"model.moe.dispatchers.{moe.dispatcher}", moe.dispatcher_options)
    routers, options = f"model.moe.routers.{moe.router}", moe.router_options
    return values | _options(routers, ROUTERS[moe.router].normal_form(options))


def _options(path: str, options: Any) -> dict[str, Any]:
    """Returns the keys of a frozen block."""
    return {f"{path}.{name}": value for name, value in dataclasses.asdict(options).items()}


def _is_plain(value: Any) -> bool:
    """Returns whether a field is a key of its own, and no block of keys."""
    return not dataclasses.is_dataclass(value) and not isinstance(value, Mapping)


def laid_out(kinds: tuple[str, ...], attentions: tuple[str, ...]) -> dict[str, Any]:
    """Returns the keys of ours that make these blocks with these attentions, with the shortest
    prefix and period.
    """
    # That of the model is the one of most blocks, and of several the first.
    of_model = max(dict.fromkeys(attentions), key=attentions.count)
    pairs = zip(kinds, attentions, strict=True)
    kinds = tuple(kind if name == of_model else f"{name}:{kind}" for kind, name in pairs)
    made = shortest(kinds)._asdict()
    return {"model.attention": of_model} | {f"model.{part}": made[part] for part in PLAN}


def shortest(kinds: tuple[str, ...]) -> Stack:
    """Returns the stack of these blocks with the shortest prefix and period, and no suffix."""
    num = len(kinds)
    best = (num, num, 1)
    for first in range(num):
        rest = kinds[first:]
        for length in range(1, len(rest) + 1):
            repeats = len(rest) // length
            if rest == rest[:length] * repeats and first + length < sum(best[:2]):
                best = (first, length, repeats)
    first, length, repeats = best
    return Stack(kinds[:first], kinds[first : first + length], repeats, ())
