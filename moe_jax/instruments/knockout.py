"""What each expert is worth: the held-out loss, per domain, without it.

    removed    its assignments go nowhere; the other gates of a token stay as they are
    around     its logit is masked, so that the next best expert takes its tokens (a router with a linear gate)

One compiled function serves every expert of every layer: the expert is data, a mask [B, M, E] of the batch (moe/probe.py).

Shapes: L MoE layers, E experts, Z domains, B rows, M blocks.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import UserError
from moe_jax.instruments import held_out
from moe_jax.instruments.held_out import Run
from moe_jax.tasks import lm

PASSIVE = {"removed": "removed", "around": "routed around"}
WAYS = {"removed": "removed_BME", "around": "barred_BME"}  # and the field of lm.Inputs that tells the layer


class Worth(NamedTuple):
    """In bits per byte: `base_Z` with all experts, `change_LEZ` what the loss of an expert adds; NaN where no row is of that domain."""

    base_Z: np.ndarray
    change_LEZ: np.ndarray
    share_LEZ: np.ndarray  # of a domain's assignments
    load_LE: np.ndarray  # of all assignments


def measure(run: Run, way: str) -> Worth:
    """Takes one evaluation per expert and layer. UserError when the router cannot go round an expert."""
    num_experts, sums_of = run.cfg.model.moe.num_experts, held_out.make_sums(run, run.cfg.model)
    total: dict[str, np.ndarray] = {}
    for batch in run.batches:
        inputs = held_out.place(run, batch)
        base = sums_of(run.params, run.router_state, inputs._replace(**told(run, WAYS[way], 0, None)))
        routing_LEZ = np.moveaxis(base["routing"][:, :, :num_experts], 1, 2)
        nll_LEZ = _without_each(run, sums_of, inputs, way)
        part = {"base": base["nll"], "bytes": base["bytes"], "nll": nll_LEZ, "routing": routing_LEZ}
        total = {name: total.get(name, 0) + value for name, value in part.items()}
    bits_Z = math.log(2) * np.where(total["bytes"] > 0, total["bytes"], np.nan)
    share = lambda z: z / np.maximum(z.sum(1, keepdims=True), 1)
    routing_LEZ = total["routing"]
    change_LEZ = (total["nll"] - total["base"]) / bits_Z
    return Worth(total["base"] / bits_Z, change_LEZ, share(routing_LEZ), share(routing_LEZ.sum(2)))


def _without_each(run: Run, sums_of: Callable[..., Any], inputs: lm.Inputs, way: str) -> np.ndarray:
    """[L, E, Z]: the summed loss of a batch without each expert."""
    cfg = run.cfg.model
    nll = np.zeros((cfg.num_moe_layers, cfg.moe.num_experts, len(run.dataset.domains)))
    for layer, expert in np.ndindex(nll.shape[:2]):
        sums = sums_of(run.params, run.router_state, inputs._replace(**told(run, WAYS[way], layer, expert)))
        nll[layer, expert] = sums["nll"]
        if way == "around" and sums["routing"][layer, :, expert].any():
            raise UserError(f'model.moe.router = "{cfg.moe.router}" does not go round expert {expert} of layer {layer}')
    return nll


def told(run: Run, field: str, layer: int, expert: int | None) -> dict[str, Any]:
    """The field of lm.Inputs that takes one expert of one MoE layer away, on every row; None: no expert."""
    cfg = run.cfg.model
    mask = np.zeros((cfg.num_moe_layers, run.cfg.eval.batch_size, cfg.moe.num_experts), bool)
    if expert is not None:
        mask[layer, :, expert] = True
    return {field: held_out.put_rows(run, held_out.of_all_blocks(cfg, mask))}


def draw(worth: Worth, domains: Sequence[str], way: str, path: Path) -> None:
    """A heat map per layer: what a domain loses (red) or gains (blue) without an expert, in bits per byte; saved as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    there = np.flatnonzero(~np.isnan(worth.base_Z))
    change_LEZ, domains = worth.change_LEZ[:, :, there], [domains[int(z)] for z in there]
    layers, num_experts, num_domains = change_LEZ.shape
    columns = min(layers, 4)
    lines = -(-layers // columns)
    width = max(2.4, 0.28 * num_experts)
    size = (1.6 + width * columns, 1.1 + (0.8 + 0.26 * num_domains) * lines)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    most = max(float(np.abs(change_LEZ).max()), 1e-9)
    for layer, ax in enumerate(axes.flat):
        if layer >= layers:
            ax.set_visible(False)
            continue
        ax.imshow(change_LEZ[layer].T, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        ax.set_title(f"MoE layer {layer}: mean {change_LEZ[layer].mean():+.3f}", fontsize=9)
        ax.set_xticks(range(num_experts) if num_experts <= 16 else range(0, num_experts, num_experts // 8))
        ax.set_yticks(range(num_domains), domains, fontsize=8)
        ax.tick_params(labelsize=8, length=0)
        ax.set_xlabel("expert", fontsize=8)
    figure.colorbar(axes.flat[0].images[0], ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
    figure.suptitle(f"bits per byte more when an expert is {PASSIVE[way]}", fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(path)
