"""ReLU routing against top-k (Wang et al. 2024, ReMoE, arXiv:2412.14711, figure 4)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.schema.config import Config
from moe_jax.study.contract import BELOW, WITHIN, Claim, Figures, Study
from moe_jax.study.statistics import Difference, Value

RELU = {
    "model.moe.router": "relu",
    "model.moe.losses.balance": 0.0,
    "model.moe.losses.z": 0.0,
    "model.moe.routers.relu.max_active": 8,
}
# In so few steps the paper's coefficient overshoots, and closed experts have no time to open again.
GENTLE = {"model.moe.routers.relu.alpha": 1.05, "model.moe.routers.relu.l1": 1e-5}


def surplus(cfg: Config, figures: Figures) -> float:
    """Returns the active experts of a token beyond those that are intended."""
    del cfg
    intended = figures["granularity"]
    return figures.get("active", intended) - intended


STUDY = Study(
    name="relu_routing",
    question="Is ReLU routing better than top-k, and does it keep its number of experts?",
    paper="Wang et al. 2024, arXiv:2412.14711, figures 4 and 5",
    equal="intended active FLOPs, total parameters, tokens",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={"top_k": {}, "relu": RELU, "relu_gentle": RELU | GENTLE},
    claims=(
        Claim("ReLU has the lower loss", Difference("relu", "top_k"), BELOW, 0.0),
        Claim("as many experts as intended", Value("relu", "surplus"), WITHIN, 0.2, "experts"),
        Claim("and gently", Value("relu_gentle", "surplus"), WITHIN, 0.2, "experts"),
    ),
    derived={"surplus": surplus},
    columns=("active", "surplus", "max_vio", "drop_fraction"),
)
