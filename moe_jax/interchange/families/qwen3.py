"""Qwen3 (Yang et al. 2025, arXiv:2505.09388), dense: heads of queries and keys are normalised."""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, key
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        decoder.heads(head_dim=128),
        decoder.biases_of_all(),
        fixed(model__qk_norm=True, model__qk_norm_over="head"),
        decoder.window_by_layer(decoder.last_layers, last=28),
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
            *decoder.OUTPUT_BIAS,
            *decoder.QK_NORMS_OF_HEADS,
            *decoder.feed_forward("mlp"),
        )
    },
)
