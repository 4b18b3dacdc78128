"""Loss-free bias against the auxiliary loss (Wang et al. 2024, arXiv:2408.15664, table 2)."""

from experiments.studies import small
from moe_jax.study.contract import BELOW, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference

BALANCE = "model.moe.losses.balance"
SIGMOID = {"model.moe.router": "sigmoid"}
RATE = "model.moe.routers.sigmoid.bias_rate"
STUDY = Study(
    name="loss_free_bias",
    question="Does a bias balance better than an auxiliary loss, at no cost in loss?",
    paper="Wang et al. 2024, arXiv:2408.15664, table 2 (perplexity and MaxVio_global)",
    equal="active FLOPs, total parameters, tokens",
    base=small(**{"train.steps": 500, "model.d_model": 48, "model.moe.num_experts": 16}),
    seeds=(0, 1, 2, 3, 4),
    arms={
        "auxiliary": SIGMOID | {BALANCE: 0.01, RATE: 0.0},
        "bias": SIGMOID | {BALANCE: 0.0, RATE: 0.001},
        "neither": SIGMOID | {BALANCE: 0.0, RATE: 0.0},
    },
    claims=(
        Claim(
            "the bias loads held-out tokens more evenly",
            Difference("bias", "auxiliary", "heldout_max_vio"),
            BELOW,
            0.0,
            "MaxVio",
            "0.04 against 0.72 (1B)",
        ),
        Claim(
            "the bias has the lower loss",
            Difference("bias", "auxiliary"),
            BELOW,
            0.0,
            paper="9.50 against 9.56 perplexity (1B)",
        ),
        Claim("the auxiliary loss costs little", Difference("auxiliary", "neither"), WITHIN, 0.02),
    ),
    columns=("heldout_max_vio", "max_vio"),
)
