"""Draws the plots of experiments anew from their committed figures; trains and measures nothing.

    python -m experiments.redraw                    # all of them
    python -m experiments.redraw sparse_inputs

Reads experiments/results/NAME/figures.json and writes plot.png beside it. The figures of two
experiments are older than the studies of their names: their plots stay as they are until these are
trained.
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

from experiments import sparse_inputs, writing
from experiments.command_line import Parser, launch
from moe_jax.errors import UserError
from moe_jax.study import plots

RESULTS = writing.ROOT / "experiments/results"


def work(argv: list[str]) -> None:
    known = drawings()
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}")
    asked = parser.parse_args(argv).names or list(known)
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise UserError(f"{unknown[0]!r} has no figures to draw: choose from {', '.join(known)}")
    for name in asked:
        figures = json.loads((RESULTS / name / "figures.json").read_text())
        known[name](figures, RESULTS / name / "plot.png")
        print(RESULTS / name / "plot.png")


def main(argv: list[str]) -> int:
    return launch(lambda: work(argv))


def drawings() -> dict[str, Callable[[Any, Path], None]]:
    """Returns what draws each plot from its figures: studies are known by their verdicts."""
    found = {"sparse_inputs": of_inputs}
    for path in sorted(RESULTS.glob("*/figures.json")):
        if "verdicts" in json.loads(path.read_text()):
            found[path.parent.name] = plots.draw
    return found


def of_inputs(figures: Any, path: Path) -> None:
    writing.plot(path, sparse_inputs.draw(figures), sparse_inputs.SIZE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
