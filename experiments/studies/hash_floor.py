"""Hash routing as the floor of learned routing (Roller et al. 2021, arXiv:2106.04426, table 3)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import BELOW, Claim, Study
from moe_jax.study.statistics import Difference

WIDE = {"model.moe.expert_hidden": 64}  # one expert has the FLOPs of the dense network
FIXED = WIDE | {"model.moe.losses.balance": 0.0}
STUDY = Study(
    name="hash_floor",
    question="Does a learned router beat a fixed hash of the token?",
    paper="Roller et al. 2021, arXiv:2106.04426, table 3 (no: the hash is better than Switch)",
    equal="active FLOPs but for the router, tokens, and but for the dense model total parameters",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={
        "switch": WIDE | {"model.moe.router": "switch"},
        "hash": FIXED | {"model.moe.router": "hash"},
        "random": FIXED | {"model.moe.router": "random", "model.moe.routers.random.k": 1},
        "dense": {"model.period": ("dense",)},
    },
    claims=(
        Claim(
            "the hash beats Switch",
            Difference("hash", "switch"),
            BELOW,
            0.0,
            paper="23.16 against 23.65 perplexity",
        ),
        Claim("Switch beats one dense network", Difference("switch", "dense"), BELOW, 0.0),
        Claim("Switch beats random experts", Difference("switch", "random"), BELOW, 0.0),
        Claim("the hash beats random experts", Difference("hash", "random"), BELOW, 0.0),
        Claim(
            "the hash beats one dense network",
            Difference("hash", "dense"),
            BELOW,
            0.0,
            paper="23.16 against 24.90 perplexity",
        ),
    ),
    columns=("max_vio",),
)
