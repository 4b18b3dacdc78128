"""A shared expert, on and off (Dai et al. 2024, DeepSeekMoE, arXiv:2401.06066, figure 3)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import BELOW, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference

K = "model.moe.routers.top_k.k"
EXPERTS = "model.moe.num_experts"
STUDY = Study(
    name="shared_expert",
    question="Does it help that one of the active experts is the same for all tokens?",
    paper="Dai et al. 2024, arXiv:2401.06066, figure 3 (yes); Muennighoff et al. 2024, "
    "arXiv:2409.02060, section 4.1.3 (no)",
    equal="active FLOPs, total parameters, tokens",
    base=tiny(**{"model.moe.expert_hidden": 16}),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={
        "routed": {EXPERTS: 16, K: 4},
        "shared": {EXPERTS: 15, K: 3, "model.moe.shared_experts": 1},
    },
    claims=(
        Claim("a shared expert helps", Difference("shared", "routed"), BELOW, 0.0),
        Claim("a shared expert makes no difference", Difference("shared", "routed"), WITHIN, 0.01),
    ),
    columns=("max_vio",),
)
