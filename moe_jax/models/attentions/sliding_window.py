"""Sliding-window attention: a token sees itself and the window - 1 tokens before it, within its
segment (Jiang et al. 2023, Mistral 7B, arXiv:2310.06825, section 2).

With L blocks, what a token is told of reaches back L (window - 1) tokens. Scores cost as many
FLOPs as the keys that are seen. All else is grouped-query attention, its weights too: a run of the
one begins from the parameters of the other. Left out is the rolling buffer of the paper: the cache
keeps all positions, and a mask hides those that the window has left behind.

A depth block would count its window in the tokens that go through it, and its cache in positions:
two models. So the two together are refused.

Many models have it in some blocks alone, "sliding_window:moe": every other one in gpt-oss
(arXiv:2508.10925) and Gemma 2 (arXiv:2408.00118). Those of Gemma 3 (arXiv:2503.19786, section 2.1)
have rotary frequencies of their own: a small base, and none of the scaling that makes the other
blocks see far.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from moe_jax.models.attention_core import Keys, windowed
from moe_jax.models.attentions import heads
from moe_jax.models.attentions.contract import Attention
from moe_jax.models.rope_scalings import UNSCALED, unscaled
from moe_jax.schema.blocks import is_depth
from moe_jax.schema.config import Config, ModelConfig
from moe_jax.schema.options import NOT_NEGATIVE, NUMBER, option, typed_options
from moe_jax.weights import Weights


@dataclasses.dataclass(frozen=True)
class Options:
    window: int = option(128, "tokens that a token sees: itself and those before it", NUMBER)
    rope_theta: float = option(
        0.0, "base of its rotary frequencies (Gemma 3); 0 = model.rope_theta", NOT_NEGATIVE
    )
    rope_scaled: bool = option(
        True, "model.rope_scaling is of this attention, too; False: of the others alone (Gemma 3)"
    )


def options_of(cfg: ModelConfig) -> Options:
    return typed_options(Options, cfg.attention_options)


def own_rope(cfg: ModelConfig) -> ModelConfig:
    """Returns the config with the rotary frequencies that a block with a window has."""
    own = options_of(cfg)
    cfg = dataclasses.replace(cfg, rope_theta=own.rope_theta or cfg.rope_theta)
    if own.rope_scaled:
        return cfg
    options = unscaled.Options()
    return dataclasses.replace(cfg, rope_scaling=UNSCALED, rope_scaling_options=options)


def inputs(
    weights: Weights, x_BSD: Array, position_BS: Array, cfg: ModelConfig
) -> tuple[Array, Array, Array]:
    """(queries, keys, values) of whole rows."""
    return heads.inputs(weights, x_BSD, position_BS, own_rope(cfg))


def cached_inputs(
    weights: Weights, x_BSD: Array, position_BS: Array, cfg: ModelConfig
) -> tuple[Array, heads.Cache]:
    """(queries, keys and values of the tokens)."""
    return heads.cached_inputs(weights, x_BSD, position_BS, own_rope(cfg))


def keys(mask: str, segment_BS: Array, prefix_BS: Array | None, options: Options) -> Keys:
    """Returns the last `window` keys of the segment that end with the token itself."""
    del mask, prefix_BS
    return windowed(segment_BS, options.window)


def slots(position_BS: Array, last_BS: Array, num_slots: int, options: Options) -> Array:
    """Returns a mask [B, S, M]: the slots of the last `window` positions."""
    slot_11M = jnp.arange(num_slots, dtype=last_BS.dtype)[None, None, :]
    # A longer window sees no more, and may be no int32.
    first_BS = position_BS - (min(options.window, num_slots) - 1)
    # Slots are positions, so the window is a range of slots.
    return (slot_11M >= first_BS[:, :, None]) & (slot_11M <= last_BS[:, :, None])


def num_pairs(num_tokens: int, options: Options) -> int:
    """Returns 1 + 2 + .. + w of the first w = min(window, n) tokens, and w of each later one."""
    w = min(options.window, num_tokens)
    # The first w tokens see fewer, for nothing is before them.
    return w * (w + 1) // 2 + (num_tokens - w) * w


def refusals(cfg: Config, name: str) -> Iterator[str]:
    """Refuses what every attention does, depth blocks with a window, and rotary frequencies that
    cannot be.
    """
    yield from heads.refusals(cfg, name)
    own, at = options_of(cfg.model.with_attention(name)), f"model.attentions.{name}"
    if 0 < own.rope_theta <= 1:
        yield (
            f"{at}.rope_theta ({own.rope_theta}) must be above 1, or 0, which stands for "
            f"model.rope_theta ({cfg.model.rope_theta})"
        )
    if not own.rope_scaled and cfg.model.rope_scaling == UNSCALED:
        yield (
            f"{at}.rope_scaled = False does nothing, because model.rope_scaling is "
            f'"{UNSCALED}": leave the key alone'
        )
    pairs = zip(cfg.model.blocks, cfg.model.attentions, strict=True)
    if any(is_depth(kind) and attention == name for kind, attention in pairs):
        yield (
            'model.attention = "sliding_window" counts tokens that stand side by side, and a depth '
            "block has only some of them: leave depth blocks out, or set "
            "model.attention=grouped_query"
        )


def normal_form(cfg: ModelConfig) -> Options:
    """Returns the options, of which 0 stands for a base that is that of the model."""
    own = options_of(cfg)
    same = own.rope_theta == cfg.rope_theta
    return dataclasses.replace(own, rope_theta=0.0) if same else own


def advice(cfg: Config) -> Iterator[str]:
    """Yields that a window as long as the row hides nothing."""
    window = cfg.model.attention_options.window
    if window >= cfg.data.seq_len:
        yield (
            f"model.attentions.sliding_window.window = {window} hides nothing in rows of "
            f"data.seq_len = {cfg.data.seq_len} tokens: this is grouped-query attention"
        )


def small(options: Mapping[str, Any], seq_len: int) -> Iterator[tuple[str, Any]]:
    """Yields a window that most tokens of a short row have left behind."""
    yield "window", min(options["window"], max(1, seq_len // 3))


ATTENTION = Attention(
    Options,
    heads.weights,
    inputs,
    heads.scale,
    heads.widths,
    ("causal",),
    keys,
    sees_future=False,
    caching=heads.CACHING._replace(inputs=cached_inputs),
    slots=slots,
    num_pairs=num_pairs,
    refusals=refusals,
    normal_form=normal_form,
    advice=advice,
    small=small,
)
