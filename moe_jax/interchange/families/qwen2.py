"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671), dense: biases of queries, keys and
values.

Refused: the rotary embedding of images (`use_mrope`).
"""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, key, only
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        decoder.heads(),
        fixed(model__attention_bias=True),
        decoder.window_by_layer(decoder.last_layers, last=28),
        only("use_mrope", False, "rotary embedding of images"),
        rope(theta=1e4),
        decoder.layers("dense"),
        key("intermediate_size", "model.ffn_hidden"),
    ),
    ends=decoder.ENDS,
    blocks={
        "dense": (
            *decoder.NORMS_BEFORE,
            *decoder.ATTENTION,
            *decoder.ATTENTION_BIASES,
            *decoder.feed_forward("mlp"),
        )
    },
)
