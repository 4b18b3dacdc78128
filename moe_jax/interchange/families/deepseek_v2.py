"""DeepSeek-V2 and V2-Lite (arXiv:2405.04434): latent attention, dense first layers, shared experts,
and a softmax router, of all experts ("greedy") or of the best groups.

Its router is DeepSeek-V3's with another score, without a bias: our bias is zeros that never move.
"""

from typing import Any

from moe_jax.interchange import decoder, deepseek
from moe_jax.interchange.contract import Family
from moe_jax.interchange.deepseek import ROUTER
from moe_jax.interchange.entries import Entry, Ours, fixed, key, only
from moe_jax.interchange.settings import Settings

GREEDY, LIMITED = "greedy", "group_limited_greedy"


def groups() -> Entry:
    """Returns the entry of `topk_method`: whether a token is limited to some groups of experts."""

    def read(settings: Settings) -> dict[str, Any]:
        method = settings.get("topk_method", GREEDY)
        if method not in (GREEDY, LIMITED):
            raise settings.refusal("topk_method", f'moe_jax reads "{GREEDY}" and "{LIMITED}"')
        number, best = settings.get("n_group", 1), settings.get("topk_group", 1)
        if method == GREEDY or number == best:
            return {}
        return {
            f"{ROUTER}.num_groups": number,
            f"{ROUTER}.top_groups": best,
            f"{ROUTER}.group_score": "max",
        }

    def write(config: Ours) -> dict[str, Any]:
        number, best = (config.get(f"{ROUTER}.{name}", 1) for name in ("num_groups", "top_groups"))
        method = GREEDY if number == best else LIMITED
        return {"topk_method": method, "n_group": number, "topk_group": best}

    return Entry(read, write)


FAMILY = Family(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-6),
        *deepseek.latent_attention(),
        fixed(model__rope_pairs="neighbours"),
        only("mlp_bias", False, "biases of the feed-forward"),
        deepseek.first_dense(),
        fixed(
            model__moe__router="sigmoid",
            model__moe__routers__sigmoid__score="softmax",
            model__moe__routers__sigmoid__renormalize=False,
            model__moe__routers__sigmoid__bias_rate=0.0,
        ),
        only("scoring_func", "softmax", "other score in this family"),
        only("norm_topk_prob", False, "gates of this family that sum to one"),
        groups(),
        # Transformers has no default. The published models have 6.
        key("num_experts_per_tok", f"{ROUTER}.k", 6),
        key("routed_scaling_factor", f"{ROUTER}.scale", 1.0),
        key("n_routed_experts", "model.moe.num_experts", 64),
        key("moe_intermediate_size", "model.moe.expert_hidden", 1407),
        deepseek.shared(default=2),
        key("intermediate_size", "model.ffn_hidden", 11008),
    ),
    ends=decoder.ENDS,
    blocks=deepseek.blocks(deepseek.LATENT_ATTENTION, ()),
    wide=deepseek.WIDE,
    zeros=(deepseek.BIAS,),
)
