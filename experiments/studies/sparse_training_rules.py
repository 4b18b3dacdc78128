"""Rules that move zeros in the experts against a fixed mask (Evci et al. 2020, RigL, figure 2).

`narrow` has dense experts of as many weights as the sparse ones: what a rule must beat.
"""

from experiments.sparse_flops import DERIVED, EVERY
from experiments.studies import small
from moe_jax.study.contract import BELOW, Claim, Study
from moe_jax.study.statistics import Difference

HIDDEN, AT = "model.moe.expert_hidden", "model.moe.sparse."
QUARTER, SIXTEENTH = 0.25, 0.0625
# Rules that begin dense take so many steps for the FLOPs of the others: a test computes them.
FEWER = {QUARTER: {"train.steps": 851}, SIXTEENTH: {"train.steps": 755}, "threshold": 660}


def sparse(rule: str, density: float) -> dict:
    moves = {} if rule in ("static", "threshold") else {f"{AT}rules.{rule}.every": EVERY}
    return {AT + "rule": rule, AT + "patterns.unstructured.density": density} | moves


STUDY = Study(
    name="sparse_training_rules",
    question="How should sparse experts be trained?",
    paper="Evci et al. 2020, arXiv:1911.11134, figure 2 (moving zeros beats a fixed mask)",
    equal="training FLOPs (zeros count as nothing) and weights, at a quarter or a sixteenth",
    base=small(**{HIDDEN: 256, "data.slice_bytes": 400_000}),
    # Three would take more than two hours of two cores.
    tuning_seeds=(1000,),
    arms={
        "dense": {},
        "narrow_1_4": {HIDDEN: 64},
        "narrow_1_16": {HIDDEN: 16},
        "static_1_4": sparse("static", QUARTER),
        "static_1_16": sparse("static", SIXTEENTH),
        "set_1_4": sparse("set", QUARTER),
        "rigl_1_4": sparse("rigl", QUARTER),
        "rigl_1_16": sparse("rigl", SIXTEENTH),
        "magnitude_1_4": sparse("magnitude", QUARTER) | FEWER[QUARTER],
        "threshold": sparse("threshold", 0.7) | {"train.steps": FEWER["threshold"]},
    },
    claims=(
        Claim("a fixed mask beats dense", Difference("static_1_16", "narrow_1_16"), BELOW, 0.0),
        Claim("SET beats the fixed mask", Difference("set_1_4", "static_1_4"), BELOW, 0.0),
        Claim("RigL beats the fixed mask", Difference("rigl_1_4", "static_1_4"), BELOW, 0.0),
        Claim("pruning beats it, too", Difference("magnitude_1_4", "static_1_4"), BELOW, 0.0),
        Claim("and the threshold", Difference("threshold", "static_1_4"), BELOW, 0.0),
    ),
    rate=0.01,
    derived=DERIVED,
    columns=("density", "sparse_train_flops", "stored_MB"),
)
