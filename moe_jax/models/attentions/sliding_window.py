"""Sliding-window attention: a token sees itself and the window - 1 tokens before it, within its
segment (Jiang et al. 2023, Mistral 7B, arXiv:2310.06825, section 2).

With L blocks, what a token is told of reaches back L (window - 1) tokens. Scores cost as many
FLOPs as the keys that are seen. All else is grouped-query attention, its weights too: a run of the
one begins from the parameters of the other. Left out is the rolling buffer of the paper: the cache
keeps all positions, and a mask hides those that the window has left behind.

A depth block would count its window in the tokens that go through it, and its cache in positions:
two models. So the two together are refused.

Many models have it in some blocks alone, "sliding_window:moe": every other one in gpt-oss
(arXiv:2508.10925) and Gemma 2 (arXiv:2408.00118).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from moe_jax.models.attention_core import Keys, windowed
from moe_jax.models.attentions import heads
from moe_jax.models.attentions.contract import Attention
from moe_jax.schema.blocks import is_depth
from moe_jax.schema.config import Config
from moe_jax.schema.options import NUMBER, option


@dataclasses.dataclass(frozen=True)
class Options:
    window: int = option(128, "tokens that a token sees: itself and those before it", NUMBER)


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
    """Refuses what every attention does, and depth blocks with a window."""
    yield from heads.refusals(cfg, name)
    pairs = zip(cfg.model.blocks, cfg.model.attentions, strict=True)
    if any(is_depth(kind) and attention == name for kind, attention in pairs):
        yield (
            'model.attention = "sliding_window" counts tokens that stand side by side, and a depth '
            "block has only some of them: leave depth blocks out, or set "
            "model.attention=grouped_query"
        )


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
    heads.inputs,
    heads.scale,
    heads.widths,
    ("causal",),
    keys,
    sees_future=False,
    caching=heads.CACHING,
    slots=slots,
    num_pairs=num_pairs,
    refusals=refusals,
    advice=advice,
    small=small,
)
