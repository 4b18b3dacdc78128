"""Qwen1.5-MoE and Qwen2-MoE (Yang et al. 2024, arXiv:2407.10671): experts in some layers or in all,
and beside them one shared expert of its own width, which a sigmoid gates.
"""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, key
from moe_jax.interchange.rotary import rope
from moe_jax.interchange.rows import Row


def slides(layer: int, max_window_layers: int) -> bool:
    """Returns whether a layer has the window: every other one below max_window_layers."""
    return layer % 2 == 0 and layer < max_window_layers


ATTENTION = (*decoder.NORMS_BEFORE, *decoder.ATTENTION, *decoder.ATTENTION_BIASES)
FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        decoder.heads(),
        key("qkv_bias", "model.attention_bias", True),
        decoder.window_by_layer(slides, last=28),
        rope(theta=1e4),
        decoder.sparse_layers(),
        *decoder.top_k(k=4),
        key("norm_topk_prob", "model.moe.routers.top_k.renormalize", False),
        key("num_experts", "model.moe.num_experts", 60, also="num_local_experts"),
        key("moe_intermediate_size", "model.moe.expert_hidden", 1408),
        key("intermediate_size", "model.ffn_hidden", 5632),
        fixed(model__moe__shared_experts=1, model__moe__shared_gate=True),
        key("shared_expert_intermediate_size", "model.moe.shared_hidden", 5632),
    ),
    ends=decoder.ENDS,
    blocks={
        "moe": (
            *ATTENTION,
            *decoder.experts("mlp"),
            *decoder.feed_forward("mlp.shared_expert"),
            Row("dense/weights/gate", "D", "mlp.shared_expert_gate.weight", "1 D"),
        ),
        "dense": (*ATTENTION, *decoder.feed_forward("mlp")),
    },
)
