"""The row of metrics.jsonl that a training step makes, and what is told of it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.terminal.progress import Progress

# A layer whose load has less than this share of the most entropy uses few of its experts.
COLLAPSED = 0.5


def log_row(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns a row of metrics.jsonl: scalars of the step, and MoE figures as means over layers and
    for each layer.
    """
    # All of them in one copy: each would wait for the devices by itself.
    host = jax.device_get(values)
    # What is an array (which gradients are finite) is for other readers.
    scalars = {name: v for name, v in host.items() if np.ndim(v) == 0 and name != "moe"}
    row = {f"train/{name}": float(v) for name, v in scalars.items()}
    for name, value_L in host["moe"].items():
        # A number for each expert is too much for a row; a picture has them.
        if name == "counts":
            continue
        row[f"moe/{name}"] = float(value_L.mean())
        row |= {f"moe/layer_{layer}/{name}": float(v) for layer, v in enumerate(value_L)}
    if "load_entropy" in host["moe"]:
        row["moe/collapsed_layers"] = int((host["moe"]["load_entropy"] < COLLAPSED).sum())
    return row


class CollapseAlert:
    """Tells once when the routers of some layers send nearly all tokens to a few experts."""

    def __init__(self, progress: Progress):
        self._progress, self._told = progress, 0

    def look(self, step: int, row: Mapping[str, float]) -> None:
        """Looks at each logged row, and tells again when more layers are collapsed."""
        layers = int(row.get("moe/collapsed_layers", 0))
        if layers > self._told:
            self._progress.message(
                f"step {step}: the router of {layers} layer(s) has collapsed: the entropy of the "
                f"experts' load is below {COLLAPSED} of the most (moe/collapsed_layers). A balance "
                "loss or another router helps: docs/balance.md"
            )
        self._told = max(self._told, layers)
