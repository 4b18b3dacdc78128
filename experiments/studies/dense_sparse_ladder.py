"""Dense against sparse on a ladder of sizes (Clark et al. 2022, arXiv:2202.01169, figure 1)."""

from experiments.studies import TINY_RATE, tiny
from moe_jax.study.contract import ABOVE, BELOW, Claim, Study
from moe_jax.study.statistics import Difference, Speedup

# A sparse model has twice the parameters of a dense one of its width: the dense ladder goes on to
# 48, so that both are compared within it.
WIDTHS = (24, 32, 48)
DENSE = tuple(f"dense_{width}" for width in WIDTHS)
SPARSE = tuple(f"sparse_{width}" for width in WIDTHS[:2])


def sized(width: int) -> dict:
    return {"model.d_model": width, "model.ffn_hidden": 2 * width, "model.moe.expert_hidden": width}


def speedup(x: str) -> Speedup:
    return Speedup(SPARSE, DENSE, x)


STUDY = Study(
    name="dense_sparse_ladder",
    question="What is a sparse model worth in dense FLOPs, active and total parameters?",
    paper="Clark et al. 2022, arXiv:2202.01169, figure 1; Krajewski et al. 2024, arXiv:2402.07871",
    equal="tokens; sizes are compared at equal training FLOPs, active or total parameters by a fit",
    base=tiny(),
    rate=TINY_RATE,
    seeds=(0, 1, 2, 3, 4),
    arms={f"dense_{width}": sized(width) | {"model.period": ("dense",)} for width in WIDTHS}
    | {f"sparse_{width}": sized(width) for width in WIDTHS[:2]},
    claims=(
        Claim("larger dense models are better", Difference("dense_48", "dense_32"), BELOW, 0.0),
        Claim("beats twice the dense FLOPs", Difference("sparse_32", "dense_48"), BELOW, 0.0),
        Claim(
            "fewer training FLOPs",
            speedup("train_flops"),
            ABOVE,
            1.0,
            "times",
            "20 times at 1e20 FLOPs (Krajewski)",
        ),
        Claim("fewer active parameters", speedup("active_parameters"), ABOVE, 1.0, "times"),
        Claim("but more parameters in all", speedup("total_parameters"), BELOW, 1.0, "times"),
    ),
)
