"""Epochs of limited data (Muennighoff et al. 2023, arXiv:2305.16264, figure 5)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference, Interaction

DENSE = {"model.period": ("dense",)}
FOUR, SIXTEEN = {"data.slice_bytes": 21_300}, {"data.slice_bytes": 5_300}
STUDY = Study(
    name="epochs",
    question="What are repeated tokens worth, and do experts need new ones more than dense models?",
    paper="Muennighoff et al. 2023, arXiv:2305.16264, figure 5 (four epochs are as good as new)",
    equal="tokens seen, active FLOPs; not the number of different tokens",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={
        "moe_1": {},
        "moe_4": FOUR,
        "moe_16": SIXTEEN,
        "dense_1": DENSE,
        "dense_4": DENSE | FOUR,
        "dense_16": DENSE | SIXTEEN,
    },
    claims=(
        Claim("4 epochs are as good as new text", Difference("moe_4", "moe_1"), WITHIN, 0.02),
        Claim("16 epochs are not", Difference("moe_16", "moe_1"), ABOVE, 0.02),
        Claim(
            "experts lose more by 16 epochs than dense models",
            Interaction("moe_16", "moe_1", "dense_16", "dense_1"),
            ABOVE,
            0.0,
        ),
    ),
)
