"""Token rounding against exact loads (Guo et al. 2025, SonicMoE, arXiv:2512.14080, table 2)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import WITHIN, Claim, Study
from moe_jax.study.statistics import Difference

ROUNDED = {"model.moe.ordering": "rounding", "model.allow_leak": True}
STUDY = Study(
    name="token_rounding",
    question="What does it cost to round the loads of experts to whole tiles?",
    paper="Guo et al. 2025, arXiv:2512.14080, table 2 (nothing)",
    equal="active FLOPs on average, total parameters, tokens; evaluated without rounding",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={
        "exact": {},
        "tile_8": ROUNDED | {"model.moe.orderings.rounding.tile": 8},
        "tile_32": ROUNDED | {"model.moe.orderings.rounding.tile": 32},
    },
    claims=(
        Claim("tiles of 8 cost nothing", Difference("tile_8", "exact"), WITHIN, 0.01),
        Claim("tiles of 32 cost nothing", Difference("tile_32", "exact"), WITHIN, 0.01),
    ),
    columns=("drop_fraction",),
)
