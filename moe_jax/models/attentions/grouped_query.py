"""Grouped-query attention: query heads share key and value heads (Ainslie et al. 2023,
arXiv:2305.13245); as many of both are multi-head attention (Vaswani et al. 2017, arXiv:1706.03762).
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from moe_jax.models.attention_core import Keys, causal, full, prefix
from moe_jax.models.attentions import heads
from moe_jax.models.attentions.contract import Attention


@dataclasses.dataclass(frozen=True)
class Options:
    """There are none: heads are those of every attention (model.num_heads, model.num_kv_heads)."""


def keys(mask: str, segment_BS: Array, prefix_BS: Array | None, options: Options) -> Keys:
    """Returns the keys of the mask: all that it allows."""
    del options
    if mask == "full":
        return full(segment_BS)
    if mask == "prefix" and prefix_BS is not None:
        return prefix(segment_BS, prefix_BS)
    return causal(segment_BS)


def slots(position_BS: Array, last_BS: Array, num_slots: int, options: Options) -> Array:
    """Returns a mask [B, S, M]: every slot up to a token's last."""
    del position_BS, options
    slot_11M = jnp.arange(num_slots, dtype=last_BS.dtype)[None, None, :]
    return slot_11M <= last_BS[:, :, None]


def num_pairs(num_tokens: int, options: Options) -> int:
    """Returns 1 + 2 + .. + n: the token at place i sees i + 1 keys."""
    del options
    return num_tokens * (num_tokens + 1) // 2


ATTENTION = Attention(
    Options,
    heads.weights,
    heads.inputs,
    heads.scale,
    heads.widths,
    ("causal", "full", "prefix"),
    keys,
    sees_future=False,
    caching=heads.CACHING,
    slots=slots,
    num_pairs=num_pairs,
    refusals=heads.refusals,
)
