"""A page of panels, one for each MoE layer, whose places are in inches from the upper left corner:
the automatic layouts of matplotlib take a minute for 32 layers.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DPI = 110
# Points of the letters.
SMALL = 8
# Inches of such a letter.
LETTER = 0.075
# Inches of a line of a title.
LINE = 0.17
# Letters of a title.
LETTERS_PER_INCH = 13.5
# Inches between two panels of a line.
GAP = 0.2
# Inches of a picture.
WIDEST = 22.0
# Experts up to which each has its number, and each cell its percentage.
NUMBERED = 16


class Plan(NamedTuple):
    """Holds how the panels of the layers are put together; sizes in inches."""

    # Of the first panel: names of domains stand there.
    left: float
    # Of a panel.
    width: float
    # Height of the upper axes of a panel.
    above: float
    # And of the lower ones.
    below: float
    columns: int
    lines: int

    @property
    def panel(self) -> float:
        """Returns the height of a panel with its title, its ticks and the space to the next."""
        return self.above + self.below + 0.68

    @property
    def total(self) -> float:
        """Returns the width of all panels, with the bar of colours and its labels."""
        return self.left + self.columns * (self.width + GAP) + 1.2


def plan(layers: int, num_experts: int, names: Sequence[str], above: float) -> Plan:
    """Returns the plan with as many columns of panels as make the picture about as high as it is
    wide, and no wider than WIDEST.
    """
    # A cell is wide enough for its percentage, as long as it has one.
    if num_experts <= NUMBERED:
        cell_width = 0.34
    else:
        cell_width = 0.17 if num_experts <= 32 else 0.11
    cell_height = 0.2
    one_column = Plan(
        left=0.9 + LETTER * max(map(len, names)),
        width=max(1.8, cell_width * num_experts),
        above=above,
        below=cell_height * len(names),
        columns=1,
        lines=layers,
    )
    plans = []
    for columns in range(1, layers + 1):
        lines = math.ceil(layers / columns)
        plans.append(one_column._replace(columns=columns, lines=lines))
    # One column is taken even where it is too wide, for nothing is narrower.
    fitting = [plan for plan in plans if plan.total <= WIDEST] or plans[:1]
    # The larger side decides: the plan that is nearest to a square.
    return min(fitting, key=lambda plan: max(plan.total, plan.lines * plan.panel))


class Page:
    """A figure on which things are placed from the top to the bottom, in inches."""

    def __init__(self, width: float, height: float):
        # Imported here: a run that draws nothing need not wait for it.
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI)

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        """Returns new axes whose upper left corner is at (left, top)."""
        # matplotlib counts in shares of the figure, from its lower left corner.
        bottom = self.height - top - height
        share = left / self.width, bottom / self.height, width / self.width, height / self.height
        ax = self.figure.add_axes(share)
        ax.tick_params(labelsize=SMALL)
        return ax

    def title(self, top: float, text: str) -> None:
        x, y = 0.1 / self.width, 1 - top / self.height
        lines = "\n".join(broken(text, self.width))
        self.figure.text(x, y, lines, fontsize=SMALL + 1, va="top")

    def save(self, path: Path) -> np.ndarray:
        """Writes a PNG, and returns the pixels [H, W, 3] too."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.image import imsave

        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        image = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        imsave(path, image)
        return image


def broken(title: str, width: float) -> list[str]:
    """Returns the lines of a title in a picture of `width` inches."""
    return textwrap.wrap(title, int(LETTERS_PER_INCH * width))
