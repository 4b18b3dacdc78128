"""Break-even of decoding (Rajbhandari et al. 2022, DeepSpeed-MoE, arXiv:2201.05596, figure 10)."""

from experiments.studies import small
from moe_jax.study.contract import ABOVE, BELOW, RATE, Claim, Study
from moe_jax.study.statistics import Value

STUDY = Study(
    name="decoding",
    question="From how many rows on is decoding with experts slower than a dense model?",
    paper="Rajbhandari et al. 2022, arXiv:2201.05596, section 5 (few rows touch few experts)",
    equal="active FLOPs and active parameters of the dense twin; random weights, timed in turn",
    base=small(**{"train.steps": 1, RATE: 1e-3, "model.d_model": 256, "data.slice_bytes": 20_000}),
    arms={
        "e8": {"model.moe.expert_hidden": 256},
        "e64": {"model.moe.expert_hidden": 256, "model.moe.num_experts": 64},
    },
    claims=(
        Claim("one row is as fast", Value("e8", "decode_ratio_1"), BELOW, 1.25, "times"),
        Claim("64 rows are slower", Value("e8", "decode_ratio_64"), ABOVE, 1.25, "times"),
        Claim("one row of 64 experts", Value("e64", "decode_ratio_1"), BELOW, 1.25, "times"),
        Claim("64 rows of 64 experts", Value("e64", "decode_ratio_64"), ABOVE, 1.25, "times"),
    ),
    seeds=(0, 1, 2, 3, 4),
    figure="decode_ratio_1",
    measures=("decoding",),
    columns=("decode_ratio_1", "decode_ratio_8", "decode_ratio_64"),
)
