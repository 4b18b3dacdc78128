"""dots.llm1 (Huo et al. 2025, arXiv:2506.05767): the router of DeepSeek-V3, a sigmoid with a bias
that balances, over ordinary attention; the first layers are dense, and shared experts have no gate.
"""

from typing import Any

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import Entry, Ours, fixed, key
from moe_jax.interchange.meaning import BLOCKS
from moe_jax.interchange.rotary import rope
from moe_jax.interchange.rows import Row
from moe_jax.interchange.settings import Settings

SHARED, HIDDEN = "model.moe.shared_experts", "model.moe.shared_hidden"


def first_dense() -> Entry:
    """Returns the entry of layers of which the first `first_k_dense_replace` have no experts."""

    def read(settings: Settings) -> dict[str, Any]:
        num_layers = settings.number("num_hidden_layers")
        num_dense = min(settings.get("first_k_dense_replace", 0), num_layers)
        return {BLOCKS: ("dense",) * num_dense + ("moe",) * (num_layers - num_dense)}

    def write(config: Ours) -> dict[str, Any]:
        kinds = config[BLOCKS]
        num_dense = next((i for i, kind in enumerate(kinds) if kind == "moe"), len(kinds))
        return {"num_hidden_layers": len(kinds), "first_k_dense_replace": num_dense}

    return Entry(read, write)


def shared() -> Entry:
    """Returns the entry of shared experts: at least one, each as wide as a routed one."""

    def read(settings: Settings) -> dict[str, Any]:
        width = settings.number("n_shared_experts", 1) * settings.number("moe_intermediate_size")
        return {SHARED: 1, HIDDEN: width}

    def write(config: Ours) -> dict[str, Any]:
        width = config.get("model.moe.expert_hidden", 1)
        return {"n_shared_experts": max(config.get(HIDDEN, 0) // width, 1)}

    return Entry(read, write)


ROUTER = "model.moe.routers.sigmoid"
ATTENTION = (
    *decoder.NORMS_BEFORE,
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
        first_dense(),
        fixed(model__moe__router="sigmoid", model__moe__routers__sigmoid__score="sigmoid"),
        key("num_experts_per_tok", f"{ROUTER}.k", 6),
        key("norm_topk_prob", f"{ROUTER}.renormalize", False),
        key("routed_scaling_factor", f"{ROUTER}.scale", 1.0),
        key("n_group", f"{ROUTER}.num_groups", 1),
        key("topk_group", f"{ROUTER}.top_groups", 1),
        key("n_routed_experts", "model.moe.num_experts", 128),
        key("moe_intermediate_size", "model.moe.expert_hidden", 1408),
        shared(),
        key("intermediate_size", "model.ffn_hidden", 10944),
    ),
    ends=decoder.ENDS,
    blocks={
        "moe": (
            *ATTENTION,
            *decoder.experts("mlp"),
            Row("moe/state/bias", "E", "mlp.gate.e_score_correction_bias", "E"),
            *decoder.feed_forward("mlp.shared_experts"),
        ),
        "dense": (*ATTENTION, *decoder.feed_forward("mlp")),
    },
    wide=("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
)
