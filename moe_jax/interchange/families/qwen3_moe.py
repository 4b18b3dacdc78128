"""Qwen3-MoE (Yang et al. 2025, arXiv:2505.09388): Qwen3 with experts in some layers or in all.

With `use_sliding_window` every layer has the window.
"""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, ignored, key
from moe_jax.interchange.rotary import rope

ATTENTION = (
    *decoder.NORMS_BEFORE,
    *decoder.ATTENTION,
    *decoder.ATTENTION_BIASES,
    *decoder.OUTPUT_BIAS,
    *decoder.QK_NORMS_OF_HEADS,
)
FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        decoder.heads(),
        decoder.biases_of_all(),
        fixed(model__qk_norm=True, model__qk_norm_over="head"),
        decoder.window_if_used(),
        # Published configs have it, and the model does not read it.
        ignored("max_window_layers"),
        rope(theta=1e4),
        decoder.sparse_layers(),
        *decoder.top_k(k=8),
        key("norm_topk_prob", "model.moe.routers.top_k.renormalize", False),
        key("num_experts", "model.moe.num_experts", 128, also="num_local_experts"),
        key("moe_intermediate_size", "model.moe.expert_hidden", 768),
        key("intermediate_size", "model.ffn_hidden", 6144),
    ),
    ends=decoder.ENDS,
    blocks={
        "moe": (*ATTENTION, *decoder.experts("mlp")),
        "dense": (*ATTENTION, *decoder.feed_forward("mlp")),
    },
)
