"""A picture of the routing: which expert of which layer takes the tokens of which domain.

Shapes: L MoE layers, Z domains, E experts.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def routing(counts_LZE: np.ndarray, domains: Sequence[str], path: Path) -> np.ndarray:
    """Draws a heat map per layer, saves it as a PNG at `path` and returns it as an image [H, W, 3], uint8.

    A cell is the share of a domain's assignments that go to an expert, over the share that an even spread gives it (1 / E): white is
    even, red more, blue less. The title of a layer gives the mutual information of domain and expert, in bits: 0 when the expert says
    nothing about the domain.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, num_domains, num_experts = counts_LZE.shape
    columns = min(layers, 4)
    lines = -(-layers // columns)
    width = max(2.4, 0.28 * num_experts)
    figure = Figure(
        figsize=(1.6 + width * columns, 0.9 + (0.8 + 0.26 * num_domains) * lines), dpi=110, layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for ax in axes.flat[layers:]:
        ax.set_visible(False)
    for layer, ax in enumerate(axes.flat[:layers]):
        share_ZE = counts_LZE[layer] / np.maximum(counts_LZE[layer].sum(1, keepdims=True), 1)
        ax.imshow(
            np.log2(np.maximum(share_ZE * num_experts, 1 / 16)), cmap="RdBu_r", vmin=-2.5, vmax=2.5, aspect="auto"
        )
        ax.set_title(f"MoE layer {layer}: {mutual_information(counts_LZE[layer]):.2f} bits", fontsize=9)
        ax.set_xticks(range(num_experts) if num_experts <= 16 else range(0, num_experts, num_experts // 8))
        ax.set_yticks(range(num_domains), domains, fontsize=8)
        ax.tick_params(labelsize=8, length=0)
        ax.set_xlabel("expert", fontsize=8)
    bar = figure.colorbar(axes.flat[0].images[0], ax=axes, shrink=0.8, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "even", "x 2", "x 4"], fontsize=8)
    figure.suptitle("share of a domain's tokens that an expert takes, against an even spread", fontsize=10)
    canvas = FigureCanvasAgg(figure)
    figure.savefig(path)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def mutual_information(counts_ZE: np.ndarray) -> float:
    """I(domain; expert) in bits, from counts of assignments; each domain that has any weighs the same."""
    there_ZE = counts_ZE[counts_ZE.sum(1) > 0]
    if not len(there_ZE):
        return 0.0
    conditional_ZE = there_ZE / there_ZE.sum(1, keepdims=True)
    mean_E = conditional_ZE.mean(0)
    ratio_ZE = np.where(conditional_ZE > 0, conditional_ZE / np.maximum(mean_E, 1e-30), 1)
    return float((conditional_ZE * np.log2(ratio_ZE)).sum(1).mean())
