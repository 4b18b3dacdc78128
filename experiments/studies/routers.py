"""Every router on one model, beside the top-k of Shazeer et al. 2017.

What a router needs beside its name: its own balance instead of the loss's, or leave to leak.
"""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import BELOW, Claim, Study
from moe_jax.study.statistics import Difference

NO_BALANCE = {"model.moe.losses.balance": 0.0}
LEAKS = NO_BALANCE | {"model.allow_leak": True}
NEEDS = {
    "top_k": {},
    "switch": {},
    "noisy_top_k": {},
    "sigmoid": NO_BALANCE,
    "quantile": NO_BALANCE,
    "cosine": {},
    "multi_gate": {},  # two gates, by the parity of the position
    "null": {},
    "relu": NO_BALANCE | {"model.moe.losses.z": 0.0},
    "hash": NO_BALANCE,
    "uniform": NO_BALANCE,
    "random": NO_BALANCE,
    "expert_choice": LEAKS,
    "base": LEAKS,
    "soft": LEAKS | {"model.moe.dispatcher": "slots"},
}
STUDY = Study(
    name="routers",
    question="Which router trains best at equal steps, and how evenly does it load the experts?",
    paper="Shazeer et al. 2017, arXiv:1701.06538, and the paper of each router (docs/routers.md)",
    equal="total parameters but for the router, tokens; not the number of experts of a token",
    base=tiny(),
    rate=TINY_RATE,
    arms={name: {"model.moe.router": name} | needs for name, needs in NEEDS.items()},
    claims=(
        Claim("top-k beats random experts", Difference("top_k", "random"), BELOW, 0.0),
        Claim("top-k beats the hash", Difference("top_k", "hash"), BELOW, 0.0),
        Claim("the bias beats the loss", Difference("sigmoid", "top_k"), BELOW, 0.0),
    ),
    columns=("heldout_max_vio", "max_vio", "active", "drop_fraction"),
)
