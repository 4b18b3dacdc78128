"""DeepSeek-V3 and R1 (arXiv:2412.19437): latent attention, dense first layers, a shared expert, and
a sigmoid router with a bias that balances, limited to groups of experts.

The released checkpoints are in FP8 (interchange/fp8.py). Layers behind the last one predict further
tokens (interchange/further.py).
"""

from typing import Any

from moe_jax.interchange import decoder, deepseek, fp8
from moe_jax.interchange.contract import Family
from moe_jax.interchange.deepseek import ROUTER
from moe_jax.interchange.entries import Entry, Ours, fixed, key, only
from moe_jax.interchange.settings import Settings


def pairs() -> Entry:
    """Returns the entry of `rope_interleave`: which numbers of a head turn together."""

    def read(settings: Settings) -> dict[str, Any]:
        neighbours = settings.get("rope_interleave", True)
        return {"model.rope_pairs": "neighbours" if neighbours else "halves"}

    def write(config: Ours) -> dict[str, Any]:
        return {"rope_interleave": config["model.rope_pairs"] == "neighbours"}

    return Entry(read, write)


FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        *deepseek.latent_attention(),
        pairs(),
        deepseek.first_dense(default=3),
        fixed(model__moe__router="sigmoid", model__moe__routers__sigmoid__score="sigmoid"),
        only("scoring_func", "sigmoid", "other score in this family"),
        only("topk_method", "noaux_tc", "other choice of experts in this family"),
        key("num_experts_per_tok", f"{ROUTER}.k", 8),
        key("norm_topk_prob", f"{ROUTER}.renormalize", True),
        key("routed_scaling_factor", f"{ROUTER}.scale", 2.5),
        key("n_group", f"{ROUTER}.num_groups", 8),
        key("topk_group", f"{ROUTER}.top_groups", 4),
        key("n_routed_experts", "model.moe.num_experts", 256),
        key("moe_intermediate_size", "model.moe.expert_hidden", 2048),
        deepseek.shared(default=1),
        key("intermediate_size", "model.ffn_hidden", 18432),
        fp8.entry(),
    ),
    ends=decoder.ENDS,
    blocks=deepseek.blocks(deepseek.LATENT_ATTENTION, deepseek.CORRECTION),
    quantized=fp8.unpacked,
    wide=deepseek.WIDE,
    further_layers="num_nextn_predict_layers",
    joins=deepseek.JOINS,
    copies=deepseek.COPIES,
)
