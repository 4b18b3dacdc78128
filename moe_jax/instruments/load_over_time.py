"""The load of every expert over the steps of a run: one panel for each MoE layer, steps downwards,
experts to the right.

Shapes: L MoE layers, T steps that were noted, E experts.
"""

import math
from typing import Any

import numpy as np

# Steps in the picture: beyond them every second one is forgotten.
MOST_ROWS = 256
# All sizes are in inches.
# Width of an expert's column.
CELL = 0.16
# Height of a panel.
PANEL = 1.7
# Between two panels.
GAP = 0.55
# Title of a panel.
TITLE = 0.2
# Title of the picture.
HEADING = 0.35
# Before the panels: "step" and its numbers.
LEFT = 0.75
# Behind the panels: the scale of the colours.
SCALE = 1.1
# Width of all panels of a line, at most.
WIDEST = 12.0
# Powers of two above and below the mean that have a colour of their own.
SHADES = 2.5


class LoadOverTime:
    """Notes the assignments of steps to the experts of each layer, and draws them."""

    def __init__(self, num_experts: int):
        self._num_experts = num_experts
        self._steps: list[int] = []
        # Over the mean of the layer [L, E].
        self._load: list[np.ndarray] = []

    def note(self, step: int, counts_LC: np.ndarray) -> None:
        """Notes the counts of a step; classes behind the experts (null experts) are left out."""
        counts_LE = np.asarray(counts_LC, np.float64)[:, : self._num_experts]
        mean_L1 = counts_LE.mean(1, keepdims=True)
        self._steps.append(step)
        self._load.append(counts_LE / np.where(mean_L1 > 0, mean_L1, 1))
        # The picture is of the whole run, however long, and the memory has a bound.
        if len(self._steps) > MOST_ROWS:
            # Every second one goes: old steps are then twice as far apart as new ones.
            self._steps, self._load = self._steps[::2], self._load[::2]

    def __len__(self) -> int:
        return len(self._steps)

    def picture(self) -> np.ndarray:
        """Returns an image [H, W, 3], uint8: white is the mean load of the layer, red more, blue
        less.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        load_LTE = np.stack(self._load, 1)
        num_layers, _, num_experts = load_LTE.shape
        panel_width = min(max(CELL * num_experts, 1.2), WIDEST)
        columns = min(num_layers, max(1, int(WIDEST / (panel_width + GAP))))
        lines = math.ceil(num_layers / columns)
        line_height = TITLE + PANEL + GAP
        width = LEFT + columns * (panel_width + GAP) + SCALE
        height = HEADING + lines * line_height
        figure = Figure(figsize=(width, height), dpi=100)

        def add_axes(left: float, top: float, axes_width: float) -> Any:
            # matplotlib counts in shares of the figure, from the lower left corner.
            bottom = height - top - PANEL
            share = left / width, bottom / height, axes_width / width, PANEL / height
            return figure.add_axes(share)

        for layer in range(num_layers):
            line, column = divmod(layer, columns)
            left = LEFT + column * (panel_width + GAP)
            ax = add_axes(left, HEADING + line * line_height + TITLE, panel_width)
            self._panel(ax, load_LTE[layer], f"MoE layer {layer}", first=column == 0)
        right = LEFT + columns * (panel_width + GAP)
        _draw_scale(add_axes(right, HEADING + TITLE, 0.012 * width))
        heading = "load of each expert over the mean of its layer, step by step"
        figure.text(0.01, 1 - 0.25 / height, heading, fontsize=9)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def _panel(self, ax, load_TE: np.ndarray, title: str, first: bool) -> None:
        # In powers of two, so that half the mean is as blue as twice the mean is red. An expert
        # without tokens has no logarithm: it gets the darkest blue.
        powers_TE = np.log2(np.maximum(load_TE, 2.0 ** (-2 * SHADES)))
        ax.imshow(
            powers_TE,
            cmap="RdBu_r",
            vmin=-SHADES,
            vmax=SHADES,
            aspect="auto",
            interpolation="nearest",
        )
        ax.set_title(title, fontsize=8)
        ax.set_xlabel("expert", fontsize=8)
        num_steps, num_experts = load_TE.shape
        ax.set_xticks(range(0, num_experts, max(1, num_experts // 8)))
        evenly = np.linspace(0, num_steps - 1, min(num_steps, 6))
        ticks = np.unique(evenly.round().astype(int))
        # The other panels of a line have the same steps.
        ax.set_yticks(ticks, [f"{self._steps[i]:,}" for i in ticks] if first else [])
        ax.tick_params(labelsize=7, length=2)
        if first:
            ax.set_ylabel("step", fontsize=8)


def _draw_scale(ax: Any) -> None:
    """Draws the scale of the colours."""
    ax.imshow(
        np.linspace(SHADES, -SHADES, 64)[:, None],
        cmap="RdBu_r",
        aspect="auto",
        extent=(0, 1, -SHADES, SHADES),
    )
    ax.yaxis.tick_right()
    ax.set_xticks([])
    ax.set_yticks([-2, -1, 0, 1, 2], ["1/4", "1/2", "mean", "x 2", "x 4"], fontsize=7)
