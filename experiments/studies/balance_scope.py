"""Balance over the global batch or a micro-batch (Qiu et al. 2025, arXiv:2501.11873, figure 1)."""

from experiments.studies import small
from moe_jax.study.contract import ABOVE, BELOW, Claim, Study
from moe_jax.study.statistics import Difference, Slope

ROWS = (1, 2, 4, 8)
LOSSES = "model.moe.losses."
MICRO = {LOSSES + "balance": 0.0, LOSSES + "micro_batch_balance": 0.01}
ARMS = tuple(f"micro_{rows}" for rows in ROWS)
STUDY = Study(
    name="balance_scope",
    question="What does it cost to balance each micro-batch instead of the global batch?",
    paper="Qiu et al. 2025, arXiv:2501.11873, figure 1 and table 2",
    equal="active FLOPs, total parameters, tokens, coefficient of the loss",
    base=small(**{"train.batch_size": 16, "train.steps": 500}),
    arms={"global": {LOSSES + "balance": 0.01}}
    | {f"micro_{rows}": MICRO | {"train.micro_batch_size": rows} for rows in ROWS},
    claims=(
        Claim("one row a micro-batch costs", Difference("micro_1", "global"), ABOVE, 0.0),
        Claim(
            "larger micro-batches cost less",
            Slope(ARMS, ROWS),
            BELOW,
            0.0,
            "bits per byte a doubling",
        ),
    ),
    columns=("max_vio", "heldout_max_vio"),
    x={"global": 16} | dict(zip(ARMS, ROWS)),
    x_label="rows over which the load is balanced",
)
