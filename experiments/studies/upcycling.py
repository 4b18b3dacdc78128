"""Upcycling against training from scratch (Komatsuzaki et al. 2022, arXiv:2212.05055, figure 4)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, BELOW, RATE, Claim, Study
from moe_jax.study.statistics import Difference

BASE = tiny()
DENSE_STEPS = BASE["train.steps"]
# The dense model, at the rate that `when_sparse_pays` found for it.
DENSE = {"model.period": ("dense",), RATE: 2 * TINY_RATE}
SHORT, LONG = {"train.steps": DENSE_STEPS // 4}, {"train.steps": 2 * DENSE_STEPS}
STUDY = Study(
    name="upcycling",
    question="How long is a model that is upcycled from a dense one ahead of one from scratch?",
    paper="Komatsuzaki et al. 2022, arXiv:2212.05055, abstract (for 100 % of the dense budget)",
    equal="active FLOPs, total parameters; further FLOPs, or with those of the dense model all",
    base=BASE,
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={
        "scratch_25": SHORT,
        "upcycled_25": SHORT,
        "scratch_100": {},
        "upcycled_100": {},
        "scratch_200": LONG,
    },
    parents={"upcycled_25": DENSE, "upcycled_100": DENSE},
    claims=(
        Claim("ahead after 25 %", Difference("upcycled_25", "scratch_25"), BELOW, 0.0),
        Claim(
            "ahead after 100 %",
            Difference("upcycled_100", "scratch_100"),
            BELOW,
            0.0,
            paper="ahead (abstract)",
        ),
        Claim(
            "behind where the dense FLOPs count, too",
            Difference("upcycled_100", "scratch_200"),
            ABOVE,
            0.0,
        ),
    ),
    columns=("max_vio",),
)
