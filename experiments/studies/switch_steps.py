"""Steps to the loss of a dense model (Fedus et al. 2021, arXiv:2101.03961, figures 4 and 5)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, BELOW, Claim, Study
from moe_jax.study.statistics import Difference, Slope, StepRatio

EXPERTS = (2, 4, 8, 16, 32, 64)
# Steps of the dense model for one of the sparse model, by its number of experts.
PAPER = {64: "7.5 times"}
SPARSE = tuple(f"e{number}" for number in EXPERTS)
# One of the experts has the FLOPs of the dense feed-forward network.
SWITCH = {"model.moe.router": "switch", "model.moe.expert_hidden": 64}
STUDY = Study(
    name="switch_steps",
    question="How many times fewer steps does a Switch layer take to the loss of a dense one?",
    paper="Fedus et al. 2021, arXiv:2101.03961, figures 4 and 5 (7.5 times with 64 experts)",
    equal="active FLOPs, tokens",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={"dense": {"model.period": ("dense",)}}
    | {f"e{number}": SWITCH | {"model.moe.num_experts": number} for number in EXPERTS},
    claims=(
        *(
            Claim(
                f"{number} experts need fewer steps",
                *(StepRatio(f"e{number}", "dense"), ABOVE, 1.0, "times", PAPER.get(number, "")),
            )
            for number in EXPERTS
        ),
        Claim("8 experts have the lower loss", Difference("e8", "dense"), BELOW, 0.0),
        Claim(
            "every doubling of the experts lowers the loss",
            Slope(("dense", *SPARSE), (1, *EXPERTS)),
            BELOW,
            0.0,
            "bits per byte a doubling",
        ),
    ),
    columns=("max_vio",),
    x={"dense": 1} | dict(zip(SPARSE, EXPERTS)),
    x_label="experts",
)
