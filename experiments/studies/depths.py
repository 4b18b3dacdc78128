"""Mixture of depths at equal training FLOPs (Raposo et al. 2024, arXiv:2404.02258, figure 3)."""

from experiments.studies import TINY_RATE, steps_for, tiny
from moe_jax.study.contract import BELOW, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference

BASE = tiny()
FULL = {"model.period": ("dense", "dense")}
DEPTH = {
    "model.period": ("dense", "depth:dense"),
    "model.depth.capacity": 0.125,
    "model.allow_leak": True,
}
STUDY = Study(
    name="depths",
    question="Is a model better whose every second block takes an eighth of the tokens?",
    paper="Raposo et al. 2024, arXiv:2404.02258, figures 3 and 4",
    equal="training FLOPs (depths), tokens (depths_equal_tokens); evaluated by the causal rule",
    base=BASE,
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={
        "full": FULL,
        "depths": DEPTH | {"train.steps": steps_for(BASE | DEPTH, like=BASE | FULL)},
        "depths_equal_tokens": DEPTH,
    },
    claims=(
        Claim("better at equal training FLOPs", Difference("depths", "full"), BELOW, 0.0),
        Claim("as good at equal tokens", Difference("depths_equal_tokens", "full"), WITHIN, 0.02),
    ),
)
