"""The load of every expert over the steps of a run: one panel for each MoE layer, steps downwards,
experts to the right.

Shapes: L MoE layers, T steps that were noted, E experts.
"""

import numpy as np

MOST_ROWS = 256  # steps in the picture: beyond them every second one is forgotten
# Inches: the width of an expert's column, the height of a panel, the space between panels.
CELL, TALL, GAP = 0.16, 1.7, 0.55
WIDEST = 12.0  # inches of all panels of a line
SHADES = 2.5  # powers of two above and below the mean that have a colour of their own


class LoadOverTime:
    """Notes the assignments of steps to the experts of each layer, and draws them."""

    def __init__(self, num_experts: int):
        self._num_experts = num_experts
        self._steps: list[int] = []
        self._load: list[np.ndarray] = []  # over the mean of the layer [L, E]

    def note(self, step: int, counts_LC: np.ndarray) -> None:
        """Notes the counts of a step; classes behind the experts (null experts) are left out."""
        counts_LE = np.asarray(counts_LC, np.float64)[:, : self._num_experts]
        mean_L1 = counts_LE.mean(1, keepdims=True)
        self._steps.append(step)
        self._load.append(counts_LE / np.where(mean_L1 > 0, mean_L1, 1))
        if len(self._steps) > MOST_ROWS:
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
        layers, _, num_experts = load_LTE.shape
        width = min(max(CELL * num_experts, 1.2), WIDEST)
        columns = min(layers, max(1, int(WIDEST / (width + GAP))))
        lines = -(-layers // columns)
        left, bar = 0.75, 1.1  # inches beside the panels
        size = left + columns * (width + GAP) + bar, 0.35 + lines * (TALL + GAP + 0.2)
        figure = Figure(figsize=size, dpi=100)
        for layer in range(layers):
            line, column = divmod(layer, columns)
            x = left + column * (width + GAP)
            y = size[1] - 0.35 - line * (TALL + GAP + 0.2) - 0.2 - TALL
            ax = figure.add_axes((x / size[0], y / size[1], width / size[0], TALL / size[1]))
            self._panel(ax, load_LTE[layer], f"MoE layer {layer}", first=column == 0)
        self._shades(
            figure,
            (left + columns * (width + GAP)) / size[0],
            1 - (0.55 + TALL) / size[1],
            TALL / size[1],
        )
        figure.text(
            0.01,
            1 - 0.25 / size[1],
            "load of each expert over the mean of its layer, step by step",
            fontsize=9,
        )
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()

    def _panel(self, ax, load_TE: np.ndarray, title: str, first: bool) -> None:
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
        shown = np.unique(np.linspace(0, num_steps - 1, min(num_steps, 6)).round().astype(int))
        ax.set_yticks(shown, [f"{self._steps[i]:,}" for i in shown] if first else [])
        ax.tick_params(labelsize=7, length=2)
        if first:
            ax.set_ylabel("step", fontsize=8)

    def _shades(self, figure, x: float, y: float, height: float) -> None:
        """Draws the scale of the colours."""
        ax = figure.add_axes((x, y, 0.012, height))
        ax.imshow(
            np.linspace(SHADES, -SHADES, 64)[:, None],
            cmap="RdBu_r",
            aspect="auto",
            extent=(0, 1, -SHADES, SHADES),
        )
        ax.yaxis.tick_right()
        ax.set_xticks([])
        ax.set_yticks([-2, -1, 0, 1, 2], ["1/4", "1/2", "mean", "x 2", "x 4"], fontsize=7)
