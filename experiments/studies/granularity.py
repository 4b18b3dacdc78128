"""Granularity at fixed active FLOPs (Krajewski et al. 2024, arXiv:2402.07871, figure 1)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import BELOW, Claim, Study
from moe_jax.study.statistics import Difference, Slope

FINE = (1, 2, 4)
ARMS = tuple(f"g{times}" for times in FINE)


def finer(times: int) -> dict:
    return {
        "model.moe.num_experts": 8 * times,
        "model.moe.routers.top_k.k": 2 * times,
        "model.moe.expert_hidden": 32 // times,
    }


STUDY = Study(
    name="granularity",
    question="Are more and narrower experts better?",
    paper="Krajewski et al. 2024, arXiv:2402.07871, figure 1; Dai et al. 2024, arXiv:2401.06066",
    equal="active FLOPs but for the router, total parameters, tokens",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={f"g{times}": finer(times) for times in FINE},
    claims=(
        Claim("four times finer is better", Difference("g4", "g1"), BELOW, 0.0),
        Claim("every doubling helps", Slope(ARMS, FINE), BELOW, 0.0, "bits per byte a doubling"),
    ),
    columns=("max_vio",),
    x=dict(zip(ARMS, FINE)),
    x_label="granularity",
)
