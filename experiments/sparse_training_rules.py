"""How should sparse experts be trained? Loss against density for each rule, at equal parameters and
at equal training FLOPs.

    # 24 runs of half a minute on two idle cores; goes on where it stopped
    python -m experiments.sparse_training_rules
    # the table and the plot from what is there; trains nothing
    python -m experiments.sparse_training_rules --report

Hypothesis: rules that move their zeros (SET, RigL, pruning) beat the mask they began with (static),
and a sparse expert beats a dense expert of as many non-zero weights: what a sparse rule has to beat
to be worth anything.

Every cell is the same small byte-level language model but for its experts: `narrow` has dense
experts of a quarter or a sixteenth of the hidden units, the others keep as many of the weights of
wide ones. FLOPs are counted from the densities that the run logged: a zero weight counts nothing,
although on this machine it costs what any other does. A rule that begins dense, or whose zeros may
come back, takes more of them in a step, so magnitude, threshold and group_lasso have so many steps
fewer that all cells of a density take as many. What threshold and group_lasso leave is their
result, not a setting: about a quarter. `narrow`, `moe` and these two are runs of
sparsity_vs_quality.py, read from the same --out.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

from experiments import plots, run
from experiments.command_line import Flags, launch, made
from moe_jax import config
from moe_jax.plan import flops

OUT = Path("runs/sparse")
RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
STEPS, HIDDEN, EVERY = 1000, 256, 20
BASE = {
    "model.d_model": 64,
    "model.repeats": 2,
    "model.moe.expert_hidden": HIDDEN,
    "data.seq_len": 128,
    "data.slice_bytes": 400_000,
    "data.heldout_bytes": 20_000,
    "train.batch_size": 8,
    "train.steps": STEPS,
    "optim.learning_rate": 0.01,
    "log.every": 5,
}
AT = "model.moe.sparse"
MOVES = {"set": {"every": EVERY}, "rigl": {"every": EVERY}, "magnitude": {"every": EVERY}}
# What they leave is not a setting: chosen by one run each of a few values, so that about a quarter
# of the weights is left.
LASSO = 0.085  # 0.1 left 4 %
# of these two rules, whose density falls along the way: so many took the FLOPs of the others
RULE_STEPS = 660
FIRST = 0.7  # density at the start, from which the threshold follows; 0.75 left 29 %, 0.8 31 %


def narrow(density: float) -> dict[str, Any]:
    """Dense experts with as many weights as sparse ones of this density."""
    return {"model.moe.expert_hidden": round(HIDDEN * density)}


def sparse(rule: str, density: float, steps: int = STEPS) -> dict[str, Any]:
    keys = {
        f"{AT}.rule": rule,
        f"{AT}.patterns.unstructured.density": density,
        "train.steps": steps,
    }
    return keys | {f"{AT}.rules.{rule}.{key}": value for key, value in MOVES.get(rule, {}).items()}


def group_lasso(strength: float) -> dict[str, Any]:
    return {
        "train.steps": RULE_STEPS,
        f"{AT}.rule": "group_lasso",
        f"{AT}.pattern": "units",
        f"{AT}.rules.group_lasso.strength": strength,
    }


def grid(cells: Mapping[str, run.Changes]) -> run.Grid:
    return run.Grid(run.ROOT / "configs/base.py", BASE, cells, SEEDS)


# FLOPs


def training_flops(cfg: config.Config, curve: Sequence[tuple[int, float]]) -> float:
    """Of a whole run, from the experts' densities at some steps: what a zero weight would cost is
    left out.

    Forward and the gradient of activations need the weights that are not zero; the gradient of
    weights those that may move: under `threshold` all of them, for any may come back, and under
    `rigl` all of them in the steps that choose which come (Evci et al. 2020, arXiv:1911.11134,
    appendix H).
    """
    parts, options = (
        flops.forward_per_token(cfg.model, cfg.data.seq_len),
        cfg.model.moe.sparse.rule_options,
    )
    rule, rest = cfg.model.moe.sparse.rule, 3 * (parts.total - parts.experts)
    tokens, total, before = cfg.train.batch_size * cfg.data.seq_len, 0.0, 0
    most = max(density for _, density in curve) if rule in ("static", "set", "rigl") else 0.0
    for step, density in curve:  # of the steps since the last one
        density = max(density, most)  # weights that have just come are zero, and alive
        moving = {
            "threshold": 1.0,
            "rigl": density + (1 - density) / getattr(options, "every", 1),
        }.get(rule, density)
        if rule == "rigl" and step > options.end * cfg.train.steps:
            moving = density
        total += (step - before) * tokens * (rest + parts.experts * (2 * density + moving))
        before = step
    return total


def forward_flops(cfg: config.Config, density: float) -> float:
    """Per token, of the trained model."""
    parts = flops.forward_per_token(cfg.model, cfg.data.seq_len)
    return parts.total - parts.experts * (1 - density)


def magnitude_curve(steps: int, density: float) -> list[tuple[int, float]]:
    """What `magnitude` does from step to step with its default beginning and end
    (moe_jax/moe/sparse/rules.py).
    """
    end, now, curve = round(0.5 * steps), 1.0, []
    for step in range(1, steps + 1):
        curve.append((step, now))  # the step computes with the mask from before
        if step <= end and (step % EVERY == 0 or step == end):
            now = density + (1 - density) * (1 - step / end) ** 3
    return curve


def built(changes: run.Changes) -> config.Config:
    return config.build(run.read_config(grid({"": changes}), "", 0), 1)


def magnitude_steps(density: float) -> int:
    """Steps of `magnitude` that take the FLOPs of the narrow dense model's STEPS."""
    budget = training_flops(built(narrow(density)), [(STEPS, 1.0)])
    cfg = built(sparse("magnitude", density))
    return max(
        n
        for n in range(50, STEPS + 1)
        if training_flops(cfg, magnitude_curve(n, density)) <= budget
    )


QUARTER, SIXTEENTH = 0.25, 0.0625
DENSITIES = {"1_4": QUARTER, "1_16": SIXTEENTH}


CELLS = {
    **{
        f"{rule}_{name}": sparse(rule, d)
        for name, d in DENSITIES.items()
        for rule in ("static", "set", "rigl")
    },
    **{
        f"magnitude_flops_{name}": sparse("magnitude", d, magnitude_steps(d))
        for name, d in DENSITIES.items()
    },
}
# Runs of sparsity_vs_quality.py that belong into the picture.
OTHERS = {
    "moe": {},  # dense experts
    **{f"narrow_{name}": narrow(d) for name, d in DENSITIES.items()},
    "threshold_flops": sparse("threshold", FIRST, RULE_STEPS),
    "group_lasso_flops": group_lasso(LASSO),
}
SIZE = (15, 5.4)  # of the plot, in inches
WIDE = flops.parameters(built(OTHERS["moe"]).model).experts


def reference(cell: str, rule: str = "narrow") -> str:
    return f"{rule}_1_16" if cell.endswith("_1_16") else f"{rule}_1_4"


def figures(results: run.Results) -> run.Results:
    """With the FLOPs of every run, and its weights that are not zero."""
    for cell, runs in results.items():
        cfg = built((CELLS | OTHERS)[cell])
        for found in runs.values():
            found["training flops"] = training_flops(cfg, found.pop("density curve"))
            found["non-zero parameters"] = found["parameters"] - found["expert parameters"] * (
                1 - found["density"]
            )
    return results


def fraction(results: run.Results, cell: str) -> float:
    """The experts' weights that are not zero, of those of dense experts of width HIDDEN."""
    return run.mean(results, cell, "expert parameters") * run.mean(results, cell, "density") / WIDE


def against(results: run.Results, cell: str, other: str) -> str:
    comparable = cell.endswith("_1_16") == other.endswith("_1_16") and cell not in ("moe", other)
    return (
        str(run.paired(results, cell, other, "bits_per_byte"))
        if comparable and other in results
        else ""
    )


def rows(results: run.Results) -> dict[str, dict[str, Any]]:
    made = {}
    for cell in results:

        def mean(name, cell=cell):
            return run.mean(results, cell, name)

        made[cell] = {
            "bits per byte": f"{mean('bits_per_byte'):.4f}",
            "minus narrow (95 %)": against(results, cell, reference(cell)),
            "minus static (95 %)": against(results, cell, reference(cell, "static")),
            "weights of experts": f"{fraction(results, cell):.3f}",
            "TFLOP of training": f"{mean('training flops') / 1e12:.3f}",
            "steps": f"{mean('steps'):.0f}",
            "epochs": f"{mean('epochs'):.2f}",
            "seeds": len(results[cell]),
        }
    return made


def kind(cell: str) -> str:
    return cell.removesuffix("_1_4").removesuffix("_1_16")


def draw(results: run.Results) -> Any:
    """Left: loss against non-zero expert weights.

    Middle: against FLOPs. Right: paired differences to the narrow dense model.
    """
    kinds = list(dict.fromkeys(kind(cell) for cell in results))
    colours = {cell: f"C{kinds.index(kind(cell))}" for cell in results}

    def paint(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1.3, 0.8))
        beside = "(moved apart sideways; thin lines lead to the place)"
        left.set(ylabel="held-out bits per byte (mean of seeds, 95 %)")
        left.set(xlabel=f"non-zero weights of the experts\n{beside}")
        middle.set(xlabel=f"training TFLOP, zeros counted as nothing\n{beside}")
        draw_gaps(right, results, colours)
        bits = {
            cell: run.interval([f["bits_per_byte"] for f in runs.values()])
            for cell, runs in results.items()
        }

        def arm(cell: str, x: float) -> plots.Arm:
            return plots.Arm(
                cell, x, bits[cell].mean, bits[cell].half, {"marker": "o", "color": colours[cell]}
            )

        plots.arms(left, [arm(cell, fraction(results, cell)) for cell in results], log=True)
        left.set_xticks([1 / 16, 1 / 4, 1], ["1/16", "1/4", "1"])
        left.minorticks_off()
        plots.arms(
            middle,
            [arm(cell, run.mean(results, cell, "training flops") / 1e12) for cell in results],
            log=True,
        )
        plots.plain_ticks(middle.xaxis)

    return paint


def draw_gaps(axes: Any, results: run.Results, colours: Mapping[str, str]) -> None:
    compared = [cell for cell in results if against(results, cell, reference(cell))]
    for y, cell in enumerate(reversed(compared)):
        gap = run.paired(results, cell, reference(cell), "bits_per_byte")
        axes.errorbar(gap.mean, y, xerr=gap.half, marker="o", capsize=3, color=colours[cell])
    axes.set_yticks(range(len(compared)), list(reversed(compared)), fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="minus narrow dense of as many weights,\nbits per byte (paired, 95 %; right of 0 = "
        "worse)"
    )


def report(out: Path) -> None:
    results = figures(run.collected([grid(CELLS), grid(OTHERS)], out))
    about = (
        "Held-out bits per byte (mean over six domains) of byte models of 2 blocks of 8 experts, "
        f"top-2, width 64, after {STEPS} steps of "
        f"8 x 128 tokens with AdamW at one learning rate, {BASE['optim.learning_rate']}; seeds are "
        "paired (same data, same order). "
        "`weights of experts`: those "
        "that are not zero, as a fraction of those of `moe`, the dense experts of width 256. "
        "`minus narrow`: paired difference to the "
        "dense model of as many weights (`narrow_1_4`, `narrow_1_16`), positive = worse; it is "
        "decided where the interval leaves out 0. "
        "Training FLOPs count a zero weight as nothing. "
        "group_lasso_flops ended with fewer weights than what it is compared with."
    )
    parts = [about, run.table(rows(results), "cell"), "![loss against density and FLOPs](plot.png)"]
    folder = RESULTS / "sparse_training_rules"
    run.write(folder, "How should sparse experts be trained?", parts, results, draw(results), SIZE)


def work(argv: list[str]) -> None:
    parser = Flags(__doc__)
    parser.add_argument(
        "--out", type=Path, default=OUT, help="directory of the runs (default: %(default)s)"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    if args.report:
        report(args.out)
        return
    out = made(args)
    run.run_and_report(grid(CELLS)._replace(smoke=args.smoke), out, report)


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
