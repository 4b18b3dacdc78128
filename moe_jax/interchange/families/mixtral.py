"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): every layer has experts, of which a token takes k
with gates that sum to one.
"""

from moe_jax.interchange import decoder
from moe_jax.interchange.contract import Family
from moe_jax.interchange.entries import fixed, key
from moe_jax.interchange.rotary import rope

FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    entries=(
        *decoder.sizes(norm_epsilon=1e-5),
        decoder.heads(),
        decoder.window(),
        rope(theta=1e6),
        decoder.layers("moe"),
        *decoder.top_k(k=2),
        fixed(model__moe__routers__top_k__renormalize=True),
        key("num_local_experts", "model.moe.num_experts", 8),
        key("intermediate_size", "model.moe.expert_hidden", 14336),
    ),
    ends=decoder.ENDS,
    blocks={
        "moe": (
            *decoder.NORMS_BEFORE,
            *decoder.ATTENTION,
            *decoder.experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
        )
    },
)
