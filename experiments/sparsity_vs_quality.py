"""Sparse routing or sparse weights? Quality at equal active FLOPs and at equal memory, and what a
step really takes.

    # 24 runs of half a minute on two idle cores; goes on where it stopped
    python -m experiments.sparsity_vs_quality
    # the steps of all cells against each other, interleaved
    python -m experiments.sparsity_vs_quality --time
    # the table and the plot from what is there; trains nothing
    python -m experiments.sparsity_vs_quality --report

Hypothesis: at equal active FLOPs routing is better than sparse weights, for it has more weights to
choose from; at equal memory of weights sparse weights are no better than dense ones. Both differ in
time: a token that is not sent to an expert takes none, a zero in a matrix does.

The feed-forward networks, with v the weights of one of width 64 (the rest of the model is the same
everywhere):

    cell          what it is                                               stored   active per token
    slim          one dense network of width 128                           2 v      2 v
    wide          one dense network of width 512                           8 v      8 v
    wide_sparse   the same with a quarter of its weights (RigL)            2 v      2 v
    moe           8 experts of width 256, top-2                            32 v     8 v
    narrow_1_4    8 experts of width 64, top-2                             8 v      2 v
    rigl_1_4      8 experts of width 256 with a quarter of their weights   8 v      2 v
    narrow_1_16   8 experts of width 16, top-2                             2 v      1/2 v
    rigl_1_16     8 experts of width 256 with a sixteenth                  2 v      1/2 v

`rigl_1_4` and `rigl_1_16` are runs of sparse_training_rules.py, which in turn reads the dense
experts, and two rules that fit nowhere else (threshold_flops, group_lasso_flops), from here.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

from experiments import plots, run
from experiments import sparse_training_rules as rules
from experiments.command_line import Flags, launch, made
from moe_jax.config import config_file
from moe_jax.terminal.table import Table

ONE = {
    "model.moe.num_experts": 1,
    "model.moe.router": "uniform",
    "model.moe.routers.uniform.k": 1,
    "model.moe.losses.balance": 0.0,
    "model.moe.losses.z": 0.0,
}
CELLS = {
    "slim": ONE | {"model.moe.expert_hidden": 128},
    "wide": ONE | {"model.moe.expert_hidden": 512},
    "wide_sparse": ONE | {"model.moe.expert_hidden": 512} | rules.sparse("rigl", rules.QUARTER),
    **rules.OTHERS,
}
READ = {
    name: rules.CELLS[name] for name in ("rigl_1_4", "rigl_1_16")
}  # runs of sparse_training_rules.py
RESULTS = (
    "slim",
    "wide",
    "wide_sparse",
    "moe",
    "narrow_1_4",
    "rigl_1_4",
    "narrow_1_16",
    "rigl_1_16",
)
ROUNDS = 25
SIZE = (14, 5.4)  # of the plot, in inches
# (cell, reference): what the question compares.
EQUAL_FLOPS = {
    "8 v": (("moe", "wide"),),
    "2 v": (
        ("wide_sparse", "slim"),
        ("narrow_1_4", "slim"),
        ("rigl_1_4", "slim"),
        ("narrow_1_4", "wide_sparse"),
        ("rigl_1_4", "narrow_1_4"),
    ),
    "1/2 v": (("rigl_1_16", "narrow_1_16"),),
}
EQUAL_MEMORY = {
    "8 v": (("narrow_1_4", "wide"), ("rigl_1_4", "wide"), ("rigl_1_4", "narrow_1_4")),
    "2 v": (
        ("wide_sparse", "slim"),
        ("narrow_1_16", "slim"),
        ("rigl_1_16", "slim"),
        ("narrow_1_16", "wide_sparse"),
        ("rigl_1_16", "narrow_1_16"),
    ),
}


def figures(results: run.Results) -> run.Results:
    """With the active FLOPs of a token, and the bytes of the weights: values of what is not zero,
    and beside them a bit for each place.
    """
    for cell, runs in results.items():
        cfg = rules.built((CELLS | READ)[cell])
        for found in runs.values():
            curve = found.pop("density curve")
            sparse = cfg.model.moe.sparse.rule != "none"
            values = 4 * (found["parameters"] - found["expert parameters"] * (1 - found["density"]))
            found["training flops"] = rules.training_flops(cfg, curve)
            found["active flops"] = rules.forward_flops(cfg, found["density"])
            found["bytes of values"] = values
            found["bytes with places"] = values + (found["expert parameters"] / 8 if sparse else 0)
    return results


def time_steps(out: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a training step on random tokens, every cell in turn; compiled as training
    usually is.
    """
    from moe_jax.commands import bench

    steps = {}
    for cell in RESULTS:
        keys = {**run.PLAIN, **rules.BASE, **(CELLS | READ)[cell]}
        steps[cell] = bench.prepare(config_file.read(Path("base"), keys))[1]
    seconds: dict[str, list[float]] = {cell: [] for cell in steps}
    for _ in range(rounds):
        for cell, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[cell].append(time.perf_counter() - start)

    def ratio(cell):
        return statistics.median(a / b for a, b in zip(seconds[cell], seconds["slim"], strict=True))

    found = {c: {"ms": 1000 * statistics.median(seconds[c]), "ratio": ratio(c)} for c in steps}
    (out / "step_times.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def rows(results: run.Results, times: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    made = {}
    for cell in results:

        def mean(name, cell=cell):
            return run.mean(results, cell, name)

        clock = times.get(cell)
        made[cell] = {
            "bits per byte": f"{mean('bits_per_byte'):.4f}",
            "active kFLOP a token": f"{mean('active flops') / 1e3:.0f}",
            "MB of values": f"{mean('bytes of values') / 1e6:.2f}",
            "MB with places": f"{mean('bytes with places') / 1e6:.2f}",
            "training TFLOP": f"{mean('training flops') / 1e12:.3f}",
            "ms a step": f"{clock['ms']:.0f}" if clock else "",
            "time / slim": f"{clock['ratio']:.2f}" if clock else "",
            "steps": f"{mean('steps'):.0f}",
            "epochs": f"{mean('epochs'):.2f}",
            "seeds": len(results[cell]),
        }
    return made


def gaps(results: run.Results, groups: dict[str, tuple[tuple[str, str], ...]]) -> str | Table:
    made = {}
    for size, pairs in groups.items():
        for cell, other in (pair for pair in pairs if set(pair) <= results.keys()):
            gap = run.paired(results, cell, other, "bits_per_byte")
            word = ("worse" if gap.mean > 0 else "better") if gap.decided else "not decided"
            made[f"{cell} - {other}"] = {"both": size, "bits per byte (95 %)": gap, "": word}
    return run.table(made, "pair") if made else "(no pair has been run)"


def draw(results: run.Results, times: dict[str, dict[str, float]]) -> Any:
    """Loss against active FLOPs, memory and time. Square: one network; hollow: sparse weights."""

    def paint(figure: Any) -> None:
        panels = {
            "active kFLOP of a token, zeros counted as nothing": lambda c: (
                run.mean(results, c, "active flops") / 1e3
            ),
            "MB of weights (values, and a bit for each place)": lambda c: (
                run.mean(results, c, "bytes with places") / 1e6
            ),
            "measured ms of a training step": lambda c: times[c]["ms"] if c in times else None,
        }
        figure.suptitle(
            "square: one network; circle: experts; hollow: sparse weights. Moved apart sideways; "
            "thin lines lead to the place.",
            fontsize=9,
        )
        for axes, (label, place) in zip(
            figure.subplots(1, 3, sharey=True), panels.items(), strict=True
        ):
            axes.set_xlabel(label)
            if axes is figure.axes[0]:
                axes.set_ylabel("held-out bits per byte (mean of seeds, 95 %)")
            shown = [arm(results, cell, place(cell)) for cell in results if place(cell) is not None]
            if shown:
                plots.arms(axes, shown, log=True)
                plots.plain_ticks(axes.xaxis)

    return paint


def arm(results: run.Results, cell: str, x: float) -> plots.Arm:
    bits = run.interval([found["bits_per_byte"] for found in results[cell].values()])
    marker = "s" if cell in ("slim", "wide", "wide_sparse") else "o"
    fill = "none" if "sparse" in cell or "rigl" in cell or "magnitude" in cell else None
    style = {"marker": marker, "color": f"C{list(results).index(cell)}", "mfc": fill}
    return plots.Arm(cell, x, bits.mean, bits.half, style)


def report(out: Path) -> None:
    found = run.collected([rules.grid(CELLS), rules.grid(READ)], out)
    results = figures({cell: found[cell] for cell in RESULTS if cell in found})
    path = out / "step_times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    about = (
        "Held-out bits per byte (mean over six domains) of byte models of 2 blocks, width 64, "
        f"after {rules.STEPS} steps of 8 x 128 "
        f"tokens with AdamW at one learning rate, {rules.BASE['optim.learning_rate']}; paired "
        "seeds. The cells are described in "
        "sparsity_vs_quality.py. Active FLOPs: forward, per token, a zero weight counted as "
        "nothing. MB: weights that are not zero, in "
        "float32; `with places`: and one bit for each entry of a sparse matrix. Step times: "
        "forward, backward and optimizer of the whole "
        f"model, medians of {ROUNDS} rounds, every cell in turn, on two shared cores."
    )
    parts = [
        about,
        run.table(rows(results, times), "cell"),
        "At equal active FLOPs:",
        gaps(results, EQUAL_FLOPS),
        "At equal memory of weights (values; the places of unstructured zeros come on top):",
        gaps(results, EQUAL_MEMORY),
        "![loss against active FLOPs, memory and time](plot.png)",
    ]
    folder = rules.RESULTS / "sparsity_vs_quality"
    kept = {"runs": results, "step times": times}
    run.write(folder, "Sparse routing or sparse weights?", parts, kept, draw(results, times), SIZE)


def work(argv: list[str]) -> None:
    parser = Flags(__doc__)
    parser.add_argument(
        "--out", type=Path, default=rules.OUT, help="directory of the runs (default: %(default)s)"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--time", action="store_true", help="time the steps and end")
    args = parser.parse_args(argv)
    if args.report:
        report(args.out)
        return
    out = made(args)
    if args.time:
        rounds = 1 if args.smoke else ROUNDS
        print(json.dumps(time_steps(out, rounds), indent=1))
        return
    run.run_and_report(rules.grid(CELLS)._replace(smoke=args.smoke), out, report)


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
