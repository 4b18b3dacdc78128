"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060): every layer has experts; queries and keys are
normalised over all heads of a token.

Refused: `clip_qkv`, which clips queries, keys and values.
"""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, key, only
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-5),
        decoder.heads_of_whole_width(),
        decoder.biases_of_all(),
        fixed(model__qk_norm=True, model__qk_norm_over="width"),
        only("clip_qkv", None, "clipping of queries, keys and values"),
        rope(theta=1e4),
        decoder.layers("moe"),
        *decoder.top_k(k=8),
        key("norm_topk_prob", "model.moe.routers.top_k.renormalize", False),
        key("num_experts", "model.moe.num_experts", 64),
        key("intermediate_size", "model.moe.expert_hidden", 2048),
    ),
    ends=decoder.ENDS,
    blocks={
        "moe": (
            *decoder.NORMS_BEFORE,
            *decoder.ATTENTION,
            *decoder.ATTENTION_BIASES,
            *decoder.OUTPUT_BIAS,
            *decoder.QK_NORMS_OF_WIDTH,
            *decoder.experts("mlp"),
        )
    },
)
