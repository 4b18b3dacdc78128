"""Router z-loss and divergence (Zoph et al. 2022, ST-MoE, arXiv:2202.08906, table 4)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, BELOW, RATE, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference

Z = "model.moe.losses.z"
ON, OFF = {Z: 0.001}, {Z: 0.0}
HIGH, HIGHER = {RATE: 8 * TINY_RATE}, {RATE: 32 * TINY_RATE}
STUDY = Study(
    name="z_loss",
    question="Does the router z-loss keep training stable at high learning rates, at no cost?",
    paper="Zoph et al. 2022, arXiv:2202.08906, section 3.3 and table 4",
    equal="active FLOPs, total parameters, tokens; at high rates the learning rate",
    base=tiny(),
    rate=TINY_RATE,
    seeds=tuple(range(8)),
    arms={
        "off": OFF,
        "on": ON,
        "off_high": OFF | HIGH,
        "on_high": ON | HIGH,
        "off_higher": OFF | HIGHER,
        "on_higher": ON | HIGHER,
    },
    claims=(
        Claim("it costs nothing", Difference("on", "off"), WITHIN, 0.01),
        Claim("lower loss at 8 times the rate", Difference("on_high", "off_high"), BELOW, 0.0),
        Claim(
            "fewer runs diverge at 32 times the rate",
            Difference("off_higher", "on_higher", "diverged"),
            ABOVE,
            0.0,
            "share of runs",
        ),
    ),
    columns=("diverged", "worst_grad_norm"),
)
