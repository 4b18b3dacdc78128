"""Capacity against dropless (Gale et al. 2022, MegaBlocks, arXiv:2211.15841, figure 2)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import BELOW, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference


def capacity(factor: float) -> dict:
    return {
        "model.moe.dispatcher": "capacity",
        "model.moe.dispatchers.capacity.factor": factor,
        "eval.dispatcher": "dropless",
    }


STUDY = Study(
    name="capacity_factor",
    question="What do dropped assignments cost?",
    paper="Gale et al. 2022, arXiv:2211.15841, figure 2",
    equal="total parameters, tokens, intended active FLOPs; evaluated without drops",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={
        "dropless": {},
        "factor_0.5": capacity(0.5),
        "factor_1": capacity(1.0),
        "factor_2": capacity(2.0),
    },
    claims=(
        Claim("dropless beats factor 1", Difference("dropless", "factor_1"), BELOW, 0.0),
        Claim("dropless beats factor 0.5", Difference("dropless", "factor_0.5"), BELOW, 0.0),
        Claim("factor 2 is enough", Difference("factor_2", "dropless"), WITHIN, 0.01),
    ),
    columns=("drop_fraction", "max_vio"),
)
