"""What orders that see the future are worth (Riquelme et al. 2021, V-MoE, arXiv:2106.05974)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, BELOW, Claim, Study
from moe_jax.study.statistics import Difference, Value

ORDERING = "model.moe.ordering"
LEAKS = {"model.allow_leak": True}
STUDY = Study(
    name="order_leak",
    question="How many bits does a model gain that orders tokens by what comes later?",
    paper="Riquelme et al. 2021, arXiv:2106.05974, section 4 (batch priority, of images)",
    equal="active FLOPs, total parameters, tokens, capacity (factor 1)",
    base=tiny(**{"model.moe.dispatcher": "capacity", "model.moe.dispatchers.capacity.factor": 1.0}),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={
        "token_major": {ORDERING: "token_major"},
        "k_major": LEAKS | {ORDERING: "k_major"},
        "batch_priority": LEAKS | {ORDERING: "batch_priority"},
    },
    claims=(
        Claim("k-major gains by the future", Value("k_major", "leak_bits"), ABOVE, 0.0),
        Claim("batch priority gains by it", Value("batch_priority", "leak_bits"), ABOVE, 0.0),
        Claim(
            "batch priority is better with whole rows",
            Difference("batch_priority", "token_major"),
            BELOW,
            0.0,
        ),
        Claim(
            "and when text is written",
            Difference("batch_priority", "token_major", "prefix_bits_per_byte"),
            BELOW,
            0.0,
        ),
    ),
    measures=("prefix",),
    columns=("leak_bits", "prefix_bits_per_byte", "drop_fraction"),
)
