"""ReLU routing against top-k (Wang et al. 2024, ReMoE, arXiv:2412.14711, figure 4)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import BELOW, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference

RELU = {
    "model.moe.router": "relu",
    "model.moe.losses.balance": 0.0,
    "model.moe.losses.z": 0.0,
    "model.moe.routers.relu.max_active": 8,
}
STUDY = Study(
    name="relu_routing",
    question="Is ReLU routing better than top-k, and does it keep its number of experts?",
    paper="Wang et al. 2024, arXiv:2412.14711, figures 4 and 5",
    equal="intended active FLOPs, total parameters, tokens",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={"top_k": {}, "relu": RELU},
    claims=(
        Claim("ReLU has the lower loss", Difference("relu", "top_k"), BELOW, 0.0),
        Claim(
            "as many experts of a token as intended",
            Difference("relu", "top_k", "active"),
            WITHIN,
            0.2,
            "experts",
        ),
    ),
    columns=("active", "max_vio", "drop_fraction"),
)
