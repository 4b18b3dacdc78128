"""Sparse experts beside dense models of equal FLOPs and of equal memory, the plainest comparison.

Shazeer et al. 2017 (arXiv:1701.06538) and Fedus et al. 2021 compare at equal FLOPs; Clark et al.
2022 say what the parameters are worth.
"""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, BELOW, Claim, Study
from moe_jax.study.statistics import Difference, StepRatio

DENSE = {"model.period": ("dense",)}
STUDY = Study(
    name="when_sparse_pays",
    question="When do sparse experts pay: at equal FLOPs, or at equal memory, too?",
    paper="Fedus et al. 2021, arXiv:2101.03961, figures 4 to 6; Clark et al. 2022, "
    "arXiv:2202.01169, figure 1",
    equal="tokens; FLOPs of `sparse` and `dense`, parameters of `sparse` and `wide`",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    # A token uses two of eight experts, each half as wide as the dense network.
    arms={"dense": DENSE, "sparse": {}, "wide": DENSE | {"model.ffn_hidden": 256}},
    claims=(
        Claim("lower loss at equal FLOPs", Difference("sparse", "dense"), BELOW, 0.0),
        Claim(
            "fewer steps to the loss of the dense model",
            StepRatio("sparse", "dense"),
            ABOVE,
            1.0,
            "times",
            "7.5 times (Switch, 64 experts)",
        ),
        Claim("higher loss at equal memory", Difference("sparse", "wide"), ABOVE, 0.0),
    ),
    columns=("max_vio",),
)
