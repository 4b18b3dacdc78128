"""Expert choice and its leak (Zhou et al. 2022, arXiv:2202.09368, figure 2)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, BELOW, WITHIN, Claim, Study
from moe_jax.study.statistics import Difference, Value

CHOICE = {
    "model.moe.router": "expert_choice",
    "model.moe.losses.balance": 0.0,
    "model.allow_leak": True,
}
STUDY = Study(
    name="expert_choice",
    question="Is expert choice better than token choice, and how much of that is the future?",
    paper="Zhou et al. 2022, arXiv:2202.09368, figure 2 and table 2",
    equal="active FLOPs, total parameters, tokens",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={"top_k": {}, "expert_choice": CHOICE},
    claims=(
        Claim("lower loss with whole rows", Difference("expert_choice", "top_k"), BELOW, 0.0),
        Claim("seeing the rest of a row helps", Value("expert_choice", "leak_bits"), ABOVE, 0.0),
        Claim(
            "higher loss when text is written",
            Difference("expert_choice", "top_k", "prefix_bits_per_byte"),
            ABOVE,
            0.0,
        ),
        Claim("top-k sees nothing", Value("top_k", "leak_bits"), WITHIN, 1e-4),
    ),
    measures=("prefix",),
    columns=("leak_bits", "prefix_bits_per_byte", "max_vio"),
)
