"""Sparse routing or sparse weights, at equal active FLOPs and at equal memory."""

from experiments.sparse_flops import DERIVED
from experiments.studies import small
from experiments.studies.sparse_training_rules import HIDDEN, QUARTER, SIXTEENTH, sparse
from moe_jax.study.contract import BELOW, Claim, Study
from moe_jax.study.statistics import Difference

MOE = "model.moe."
ONE = {
    MOE + "num_experts": 1,
    MOE + "router": "uniform",
    MOE + "routers.uniform.k": 1,
    MOE + "losses.balance": 0.0,
    MOE + "losses.z": 0.0,
}
STUDY = Study(
    name="sparsity_vs_quality",
    question="Sparse routing or sparse weights?",
    paper="Clark et al. 2022, arXiv:2202.01169 (routing); Evci et al. 2020, arXiv:1911.11134",
    equal="tokens; active FLOPs or memory of weights, as each claim says",
    base=small(**{HIDDEN: 256, "data.slice_bytes": 400_000}),
    # Three would take more than two hours of two cores.
    tuning_seeds=(1000,),
    arms={
        "slim": ONE | {HIDDEN: 128},
        "wide": ONE | {HIDDEN: 512},
        "wide_sparse": ONE | {HIDDEN: 512} | sparse("rigl", QUARTER),
        "moe": {},
        "narrow_1_4": {HIDDEN: 64},
        "narrow_1_16": {HIDDEN: 16},
        "rigl_1_4": sparse("rigl", QUARTER),
        "rigl_1_16": sparse("rigl", SIXTEENTH),
    },
    claims=(
        Claim("routing, equal active FLOPs", Difference("moe", "wide"), BELOW, 0.0),
        Claim("zeros, equal active FLOPs", Difference("wide_sparse", "slim"), BELOW, 0.0),
        Claim("both, equal active FLOPs", Difference("rigl_1_4", "slim"), BELOW, 0.0),
        Claim("routing, equal memory", Difference("narrow_1_16", "slim"), BELOW, 0.0),
        Claim("zeros, equal memory", Difference("wide_sparse", "slim"), BELOW, 0.0),
        Claim("both, equal memory", Difference("rigl_1_4", "wide"), BELOW, 0.0),
    ),
    rate=0.01,
    derived=DERIVED,
    columns=("sparse_active_flops", "stored_MB"),
)
