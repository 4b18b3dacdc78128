"""What a model loses when its feed-forwards compute in other numbers than it was trained with
(`model.ffn_numbers`): the share of routing decisions that flip, and the held-out loss.

Everything else is as it is: parameters, attention, routers, the head. Flips of later layers count
what earlier ones changed.

Shapes: L MoE layers, B rows, S sequence, K choices.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.config import rules
from moe_jax.errors import UserError
from moe_jax.instruments import held_out, precision
from moe_jax.instruments.held_out import Run
from moe_jax.moe import probe
from moe_jax.schema.config import ModelConfig

# Of `figures`; the losses that the task reports.
LOSSES = ("bits_per_byte", "loss")


def measure(run: Run, numbers: Sequence[str]) -> dict[str, Any]:
    """Returns {numbers: {"flips": [L], "loss": value, "gap": value, ...}}, the model's own first.

    Numbers that do not go with the run have {"note": why}.
    """
    own = run.cfg.model.ffn_numbers
    experts_of_own, result = _evaluated(run, run.cfg.model, own)
    measured = {own: result}
    for name in numbers:
        if name == own:
            continue
        model = dataclasses.replace(run.cfg.model, ffn_numbers=name)
        try:
            rules.enforce(dataclasses.replace(run.cfg, model=model))
        except UserError as error:
            measured[name] = {"note": str(error)}
            continue
        experts, figures = _evaluated(run, model, name)
        measured[name] = figures | _against(run, result, experts_of_own, figures, experts)
    return measured


def _against(
    run: Run,
    own: dict[str, Any],
    own_experts: list[np.ndarray],
    figures: dict[str, Any],
    experts: list[np.ndarray],
) -> dict[str, Any]:
    """Returns the flips against the model's own routing, and how much more each loss is."""
    counts = [
        precision.flips(before, after, run.cfg.model.moe.num_experts)
        for before, after in zip(own_experts, experts, strict=True)
    ]
    gaps = {f"gap/{name}": value - own[name] for name, value in figures.items()}
    return {"flips": precision.share(np.sum(counts, 0)), **gaps}


def _evaluated(run: Run, model: ModelConfig, name: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Returns the experts [L, B, S, K] of every batch, and the losses over all of them."""
    record_of = held_out.make_record(model, probe.ROUTING)
    sums_of = held_out.make_sums(run, model)
    experts, sums = [], []
    for number, batch in enumerate(run.batches):
        run.tell(f"batch {number + 1} of {len(run.batches)}, numbers {name}")
        on_mesh = held_out.put_batch(run, batch)
        experts.append(record_of(run.params, run.router_state, on_mesh)["expert"])
        sums.append(sums_of(run.params, run.router_state, on_mesh))
    figures = held_out.figures(run, sums)
    return experts, {name: figures[name] for name in LOSSES if name in figures}
