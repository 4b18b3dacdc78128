"""GLM-4.5 and 4.6 (arXiv:2508.06471): the router of DeepSeek-V3 over grouped queries of which a
part turns; dense first layers, a shared expert, and in some a query-key norm of each head.

Layers behind the last one predict further tokens (interchange/further.py).
"""

from moe_jax.interchange import decoder, deepseek
from moe_jax.interchange.contract import Family
from moe_jax.interchange.deepseek import ROUTER
from moe_jax.interchange.entries import fixed, key
from moe_jax.interchange.rotary import rope

ATTENTION = (*decoder.ATTENTION, *decoder.ATTENTION_BIASES, *decoder.QK_NORMS_OF_HEADS)
FAMILY = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-5),
        decoder.heads(),
        key("attention_bias", "model.attention_bias", False),
        key("use_qk_norm", "model.qk_norm", False),
        rope(theta=1e4, fraction=0.5),
        deepseek.first_dense(default=1),
        fixed(model__moe__router="sigmoid", model__moe__routers__sigmoid__score="sigmoid"),
        key("num_experts_per_tok", f"{ROUTER}.k", 8),
        key("norm_topk_prob", f"{ROUTER}.renormalize", True),
        key("routed_scaling_factor", f"{ROUTER}.scale", 1.0),
        key("n_group", f"{ROUTER}.num_groups", 1),
        key("topk_group", f"{ROUTER}.top_groups", 1),
        key("n_routed_experts", "model.moe.num_experts", 128),
        key("moe_intermediate_size", "model.moe.expert_hidden", 1408),
        deepseek.shared(default=1),
        key("intermediate_size", "model.ffn_hidden", 10944),
    ),
    ends=decoder.ENDS,
    blocks=deepseek.blocks(ATTENTION, deepseek.CORRECTION),
    wide=deepseek.WIDE,
    further_layers="num_nextn_predict_layers",
    joins=deepseek.JOINS,
    copies=deepseek.COPIES,
)
