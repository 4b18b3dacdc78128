"""Sets of options of a block that families of models have together, on tests/tiny.py."""

YARN = {
    "model.rope_scaling": "yarn",
    "model.rope_scalings.yarn.factor": 4.0,
    "model.rope_scalings.yarn.original_length": 8,
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
    "Qwen2-MoE": {
        "model.attention_bias": True,
        "model.moe.shared_experts": 1,
        "model.moe.shared_hidden": 24,
        "model.moe.shared_gate": True,
        "model.moe.routers.top_k.renormalize": False,
        "model.head_dim": 8,
        **YARN,
    },
}
