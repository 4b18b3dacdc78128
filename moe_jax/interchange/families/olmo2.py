"""OLMo 2 (OLMo et al. 2024, arXiv:2501.00656), dense: norms come after attention and feed-forward,
and queries and keys are normalised over all heads of a token.
"""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, key
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-5),
        decoder.heads(),
        decoder.biases_of_all(),
        fixed(model__qk_norm=True, model__qk_norm_over="width", model__norm_position="after"),
        rope(theta=1e4),
        decoder.layers("dense"),
        key("intermediate_size", "model.ffn_hidden"),
    ),
    ends=decoder.ENDS,
    blocks={
        "dense": (
            *decoder.NORMS_AFTER,
            *decoder.ATTENTION,
            *decoder.ATTENTION_BIASES,
            *decoder.OUTPUT_BIAS,
            *decoder.QK_NORMS_OF_WIDTH,
            *decoder.feed_forward("mlp"),
        )
    },
)
