"""The picture of the README: sparse models beside dense ones, by FLOPs and by parameters.

    python -m experiments.pays            # a second; trains nothing

Reads the committed figures of the studies of STUDIES, as far as there are any, and writes
docs/pays.png. A sparse model pays where it lies below the line of the dense ones.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

from experiments import plots, writing
from experiments.command_line import Parser, launch
from moe_jax.study import judge

RESULTS = writing.ROOT / "experiments/results"
PICTURE = writing.ROOT / "docs/pays.png"
# Studies of models of one kind, and their arms that are left out: routers that learn nothing.
STUDIES = {
    "when_sparse_pays": (),
    "dense_sparse_ladder": (),
    "switch_steps": (),
    "hash_floor": ("hash", "random"),
}
SIZE = (11.0, 4.4)  # inches
# The figures on the x axes: how they are called, and their unit.
PANELS = {
    "train_flops": ("GFLOP of the training", 1e9),
    "total_parameters": ("thousand parameters in all (memory)", 1e3),
}
# The panel that has the numbers of experts.
NAMED = "total_parameters"


class Point(NamedTuple):
    """A model: the mean of its seeds with the 95 % interval, at its place on each x axis."""

    name: str
    family: str
    x: Mapping[str, float]
    loss: judge.Interval


def points(folder: Path) -> list[Point]:
    """Returns the models that have runs; one that two studies have is there once."""
    found = {}
    for study, left_out in STUDIES.items():
        path = folder / study / "figures.json"
        if not path.exists():
            continue
        figures = json.loads(path.read_text(encoding="utf-8"))
        for arm, each in figures["arms"].items():
            runs = list(each["runs"].values())
            if runs and arm not in left_out:
                point = _point(arm, runs)
                found.setdefault((point.family, *point.x.values()), point)
    return list(found.values())


def _point(arm: str, runs: Sequence[Mapping[str, Any]]) -> Point:
    family = _family(runs[0])
    name = f"{runs[0]['num_experts']} experts" if family.startswith("Switch") else ""
    x = {figure: runs[0][figure] / unit for figure, (_, unit) in PANELS.items()}
    return Point(name, family, x, judge.interval([run["bits_per_byte"] for run in runs]))


def _family(run: Mapping[str, Any]) -> str:
    if run["num_experts"] == 1:
        return "dense"
    return "Switch: 1 expert a token" if run["granularity"] == 1 else "top-2 of 8 experts"


def draw(shown: Sequence[Point], figure: Any) -> None:
    """Draws a panel for each x axis."""
    families = list(dict.fromkeys(point.family for point in shown))
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (name, (label, _)) in zip(panels, PANELS.items()):
        for number, family in enumerate(families):
            _family_of(axes, name, family, shown, f"C{number}")
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.set_xlabel(label)
        plots.plain_ticks(axes.xaxis)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out bits per byte (mean, 95 %)")
    panels[0].legend(fontsize=8)
    figure.suptitle("Sparse experts pay where they lie below the line of dense models", fontsize=11)


def _family_of(axes: Any, name: str, family: str, shown: Sequence[Point], colour: str) -> None:
    models = sorted((each for each in shown if each.family == family), key=lambda m: m.x[name])
    x = [model.x[name] for model in models]
    y = [model.loss.mean for model in models]
    bars = [
        [model.loss.mean - model.loss.low for model in models],
        [model.loss.high - model.loss.mean for model in models],
    ]
    line = "-" if family == "dense" else ":"
    axes.errorbar(x, y, bars, marker="o", capsize=3, linestyle=line, color=colour, label=family)
    # By FLOPs those of one family lie upon each other, and their names would, too.
    named = models if name == NAMED else []
    for number, model in enumerate(named):
        at = (model.x[name], model.loss.mean)
        # Above and below in turn: neighbours may lie close together.
        offset = (6, -11) if number % 2 else (6, 5)
        axes.annotate(model.name, at, xytext=offset, textcoords="offset points", fontsize=8)


def work(argv: list[str]) -> None:
    Parser(__doc__).parse_args(argv)
    shown = points(RESULTS)

    def drawn(figure: Any) -> None:
        draw(shown, figure)

    writing.plot(PICTURE, drawn, SIZE)
    print(PICTURE)


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
