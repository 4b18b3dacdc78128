"""Mistral (Jiang et al. 2023, arXiv:2310.06825), dense: Llama without biases, with a window in all
layers or in none.
"""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import key
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        decoder.heads(),
        decoder.window(length=4096),
        rope(theta=1e4),
        decoder.layers("dense"),
        key("intermediate_size", "model.ffn_hidden"),
    ),
    ends=decoder.ENDS,
    blocks={
        "dense": (*decoder.NORMS_BEFORE, *decoder.ATTENTION, *decoder.feed_forward("mlp")),
    },
)
