"""Epochs of limited data (Muennighoff et al. 2023, arXiv:2305.16264, figure 5)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference, Interaction

DENSE = {"model.period": ("dense",)}
# A slice is of whole documents, at least one of each domain: 112 and 61 thousand bytes, which are
# seen 4.6 and 8.3 times. A smaller one there is not.
FEW, MANY = {"data.slice_bytes": 21_300}, {"data.slice_bytes": 5_300}
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
        "moe_5": FEW,
        "moe_8": MANY,
        "dense_1": DENSE,
        "dense_5": DENSE | FEW,
        "dense_8": DENSE | MANY,
    },
    claims=(
        Claim("4.6 epochs are as good as new text", Difference("moe_5", "moe_1"), WITHIN, 0.02),
        Claim("8.3 epochs are not", Difference("moe_8", "moe_1"), ABOVE, 0.02),
        Claim(
            "experts lose more by 8.3 epochs than dense models",
            Interaction("moe_8", "moe_1", "dense_8", "dense_1"),
            ABOVE,
            0.0,
        ),
    ),
)
