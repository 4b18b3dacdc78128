"""Draws the plots of experiments anew from their committed figures; trains and measures nothing.

    python -m experiments.redraw                    # all of them
    python -m experiments.redraw sparse_inputs

Reads experiments/results/NAME/figures.json and writes plot.png beside it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax is imported; the file may be typed as a script, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments import command_line

    command_line.hear_signals()

from experiments import run, sparse_inputs, sparse_training_rules, sparsity_vs_quality
from experiments.command_line import Parser, launch
from moe_jax.errors import UserError

RESULTS = run.ROOT / "experiments/results"


def work(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(DRAWINGS)} (default: all)"
    )
    asked = parser.parse_args(argv).names or list(DRAWINGS)
    unknown = [name for name in asked if name not in DRAWINGS]
    if unknown:
        raise UserError(f"{unknown[0]!r} has no figures to draw: choose from {', '.join(DRAWINGS)}")
    for name in asked:
        figures = json.loads((RESULTS / name / "figures.json").read_text())
        paint, size = DRAWINGS[name](figures)
        run.plot(RESULTS / name / "plot.png", paint, size)
        print(RESULTS / name / "plot.png")


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


def of_quality(figures: Any) -> tuple[Callable[[Any], None], tuple[float, float]]:
    return sparsity_vs_quality.draw(
        figures["runs"], figures["step times"]
    ), sparsity_vs_quality.SIZE


def of_rules(figures: Any) -> tuple[Callable[[Any], None], tuple[float, float]]:
    return sparse_training_rules.draw(figures), sparse_training_rules.SIZE


def of_inputs(figures: Any) -> tuple[Callable[[Any], None], tuple[float, float]]:
    return sparse_inputs.draw(figures), sparse_inputs.SIZE


DRAWINGS = {
    "sparsity_vs_quality": of_quality,
    "sparse_training_rules": of_rules,
    "sparse_inputs": of_inputs,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
