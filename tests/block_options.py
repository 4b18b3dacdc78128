"""Sets of options of a block that families of models have together, on tests/tiny.py."""

YARN = {
    "model.rope_scaling": "yarn",
    "model.rope_scalings.yarn.factor": 4.0,
    "model.rope_scalings.yarn.original_length": 8,
}
LATENT = {
    "q_lora_rank": 5,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 3,
}
OPTIONS = {
    "OLMo 2": {
        "model.prefix": ("dense",),
        "model.norm_position": "after",
        "model.qk_norm": True,
        "model.qk_norm_over": "width",
        "model.attention_bias": True,
        "model.output_bias": True,
        "model.embedding_scale": 1.0,
    },
    "Qwen2-MoE, a cap, a part that turns": {
        "model.attention_cap": 0.5,
        "model.attention_scale": 0.7,
        "model.rope_fraction": 0.5,
        "model.activation": "geglu",
        "model.attention_bias": True,
        "model.moe.shared_experts": 1,
        "model.moe.shared_hidden": 24,
        "model.moe.shared_gate": True,
        "model.moe.routers.top_k.renormalize": False,
        "model.head_dim": 8,
        **YARN,
    },
    "gpt-oss": {
        "model.period": ("sliding_window:moe", "moe"),
        "model.repeats": 1,
        "model.attentions.sliding_window.window": 3,
        "model.attention_sinks": True,
        "model.attention_bias": True,
        "model.activation": "clamped_swiglu",
        "model.activations.clamped_swiglu.limit": 0.5,
        "model.moe.expert_bias": True,
        "model.moe.routers.top_k.bias": True,
    },
    "DeepSeek-V3": {
        "model.attention": "latent",
        **{f"model.attentions.latent.{name}": width for name, width in LATENT.items()},
        "model.num_kv_heads": 4,
        "model.rope_pairs": "neighbours",
        "model.prefix": ("dense",),
        "model.moe.router": "sigmoid",
        "model.moe.routers.sigmoid.num_groups": 4,
        "model.moe.routers.sigmoid.top_groups": 2,
        "model.moe.losses.balance": 0.0,
        "model.moe.shared_experts": 1,
    },
}
