"""Balance over the global batch or a micro-batch (Qiu et al. 2025, arXiv:2501.11873, figure 1)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, BELOW, Claim, Study
from moe_jax.study.statistics import Difference

ROWS = (1, 4)
LOSSES = "model.moe.losses."
MICRO = {LOSSES + "balance": 0.0, LOSSES + "micro_batch_balance": 0.01}
STUDY = Study(
    name="balance_scope",
    question="What does it cost to balance each micro-batch instead of the global batch?",
    paper="Qiu et al. 2025, arXiv:2501.11873, figure 1 and table 2",
    equal="active FLOPs, total parameters, tokens, coefficient of the loss",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={"global": {}}
    | {f"micro_{rows}": MICRO | {"train.micro_batch_size": rows} for rows in ROWS},
    claims=(
        Claim("one row a micro-batch costs", Difference("micro_1", "global"), ABOVE, 0.0),
        Claim("four rows cost less", Difference("micro_4", "micro_1"), BELOW, 0.0),
        Claim(
            "one row balances held-out tokens worse",
            Difference("micro_1", "global", "heldout_max_vio"),
            ABOVE,
            0.0,
            "MaxVio",
        ),
    ),
    columns=("max_vio", "heldout_max_vio"),
    x={"global": 8} | {f"micro_{rows}": rows for rows in ROWS},
    x_label="rows over which the load is balanced",
)
