"""FlexOLMo (Shi et al. 2025, arXiv:2507.07024): OLMo 2 with experts in every layer."""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, key
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "flex_olmo",
    "FlexOlmoForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        decoder.heads(),
        decoder.biases_of_all(),
        fixed(model__qk_norm=True, model__qk_norm_over="width", model__norm_position="after"),
        rope(theta=5e5),
        decoder.layers("moe"),
        *decoder.top_k(k=5),
        key("norm_topk_prob", "model.moe.routers.top_k.renormalize", False),
        key("num_experts", "model.moe.num_experts", 7),
        key("intermediate_size", "model.moe.expert_hidden", 11008),
    ),
    ends=decoder.ENDS,
    blocks={
        "moe": (
            *decoder.NORMS_AFTER,
            *decoder.ATTENTION,
            *decoder.ATTENTION_BIASES,
            *decoder.OUTPUT_BIAS,
            *decoder.QK_NORMS_OF_WIDTH,
            *decoder.experts("mlp"),
        )
    },
)
