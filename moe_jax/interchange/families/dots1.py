"""dots.llm1 (Huo et al. 2025, arXiv:2506.05767): the router of DeepSeek-V3, a sigmoid with a bias
that balances, over ordinary attention; the first layers are dense, and shared experts have no gate.
"""

from moe_jax.interchange import decoder, deepseek
from moe_jax.interchange.contract import Family
from moe_jax.interchange.deepseek import ROUTER
from moe_jax.interchange.entries import fixed, key
from moe_jax.interchange.rotary import rope

ATTENTION = (
    *decoder.ATTENTION,
    *decoder.ATTENTION_BIASES,
    *decoder.OUTPUT_BIAS,
    *decoder.QK_NORMS_OF_HEADS,
)
FAMILY = Family(
    "dots1",
    "Dots1ForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        decoder.heads(),
        decoder.biases_of_all(),
        fixed(model__qk_norm=True, model__qk_norm_over="head"),
        decoder.window_by_layer(decoder.last_layers, last=62, switch=""),
        rope(theta=1e4),
        deepseek.first_dense(),
        fixed(model__moe__router="sigmoid", model__moe__routers__sigmoid__score="sigmoid"),
        key("num_experts_per_tok", f"{ROUTER}.k", 6),
        key("norm_topk_prob", f"{ROUTER}.renormalize", False),
        key("routed_scaling_factor", f"{ROUTER}.scale", 1.0),
        key("n_group", f"{ROUTER}.num_groups", 1),
        key("topk_group", f"{ROUTER}.top_groups", 1),
        key("n_routed_experts", "model.moe.num_experts", 128),
        key("moe_intermediate_size", "model.moe.expert_hidden", 1408),
        deepseek.shared(),
        key("intermediate_size", "model.ffn_hidden", 10944),
    ),
    ends=decoder.ENDS,
    blocks=deepseek.blocks(ATTENTION, deepseek.CORRECTION),
    wide=deepseek.WIDE,
)
