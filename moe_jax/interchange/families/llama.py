"""Llama (Touvron et al. 2023, arXiv:2302.13971; Llama 3, arXiv:2407.21783), dense.

Refused: `mlp_bias`, which gives the feed-forward biases.
"""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import ignored, key, only
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        decoder.heads(),
        decoder.biases_of_all(),
        only("mlp_bias", False, "biases of the feed-forward"),
        # How an old version cut its matrix products; it changes rounding alone.
        ignored("pretraining_tp"),
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
            *decoder.feed_forward("mlp"),
        )
    },
)
