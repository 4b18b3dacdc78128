"""What the page shows of one run: its curves, and the routing of the same held-out rows at every
checkpoint that is kept.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.data.load import Dataset
from moe_jax.errors import UserError
from moe_jax.instruments import held_out
from moe_jax.instruments.page.routing import Record, in_order
from moe_jax.moe import probe
from moe_jax.parallel import mesh
from moe_jax.report.metrics import read_rows
from moe_jax.run import Run, open_run
from moe_jax.tasks.lm import task as lm
from moe_jax.terminal.working import Tell

# Points of a curve at most.
MOST_POINTS = 300
# Fields of a record that every layer has.
OF_LAYERS = ("expert", "gate", "dropped")
CURVES = {
    "train/nll": "training loss (nats per token)",
    "eval/bits_per_byte": "held-out loss (bits per byte)",
    "train/learning_rate": "learning rate",
    "train/grad_norm": "gradient norm",
    "moe/max_vio": "MaxVio of a batch (mean over layers)",
    "moe/drop_fraction": "dropped assignments (mean over layers)",
    "moe/active": "experts per token (mean over layers)",
    "perf/tokens_per_second": "tokens per second",
}
LAYER_CURVES = {
    "load_max": "largest load over the mean",
    "load_entropy": "entropy of the load",
    "drop_fraction": "dropped",
}


class Collected(NamedTuple):
    """Holds what was read of a run.

    Fields:
      name: the last part of its directory.
      curves: {metric: [(step, value)]}.
      layer_curves: {metric: [(step, layer, value)]}.
      steps: checkpoints whose routing was recorded, in order.
      records: the routing of the held-out rows at each of them.
      knockout: {"domains", "change": [L, E, Z], ...} of `probe --what knockout`; None = not run.
      notes: what is missing, and why.
    """

    run: Run
    name: str
    curves: dict[str, list[tuple[int, float]]]
    layer_curves: dict[str, list[tuple[int, int, float]]]
    steps: list[int]
    records: list[Record]
    dataset: Dataset | None
    knockout: dict[str, Any] | None
    notes: list[str]


def collect(workdir: Path, num_batches: int, most_steps: int, tell: Tell) -> Collected:
    """Reads a run and records the routing of its held-out rows.

    A run without MoE layers has curves alone.
    """
    run = open_run(workdir, silent=True)
    curves, layer_curves = read_curves(workdir / "metrics.jsonl")
    notes = list(run.notes)
    steps: list[int] = []
    records: list[Record] = []
    dataset = None
    try:
        steps = spread(run.steps(), most_steps)
        with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
            dataset = lm.open_data(run.config)
            records = _records(run, dataset, steps, num_batches, tell)
    except UserError as error:
        steps, records = [], []
        notes.append(f"curves alone: {error}")
    if len(steps) == 1:
        notes.append(
            "one checkpoint alone: load over steps and saturation need more (checkpoint.every, "
            "checkpoint.keep)"
        )
    knockout = read_knockout(workdir / "probe" / "knockout.json")
    if records and knockout is None:
        notes.append(
            f"no knock-out: python -m moe_jax probe --workdir {workdir} --what knockout "
            "--ways removed"
        )
    return Collected(
        run, workdir.name, curves, layer_curves, steps, records, dataset, knockout, notes
    )


def spread(steps: Sequence[int], most: int) -> list[int]:
    """Returns at most `most` of the steps, evenly over them, the first and last among them."""
    if len(steps) <= most:
        return list(steps)
    places = np.unique(np.linspace(0, len(steps) - 1, most).round().astype(int))
    return [steps[i] for i in places]


def read_curves(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the curves of metrics.jsonl: of the run, and of each MoE layer."""
    rows = list(read_rows(path)) if path.exists() else []
    curves = {}
    for name in CURVES:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            curves[name] = thinned(points)
    layers: dict[str, Any] = {}
    # Evaluations and the rows of a dense model have no figures of experts.
    for row in thinned([row for row in rows if "moe/load_max" in row]):
        for name in LAYER_CURVES:
            # Layers are counted as far as the row has them.
            layer = 0
            while f"moe/layer_{layer}/{name}" in row:
                value = row[f"moe/layer_{layer}/{name}"]
                layers.setdefault(name, []).append((row["step"], layer, value))
                layer += 1
    return curves, layers


def thinned(points: Sequence[Any]) -> list[Any]:
    """Returns every n-th point, so that at most MOST_POINTS are left, and the last one."""
    # Rounded up; 1 where there are no points at all.
    every = -(-len(points) // MOST_POINTS) or 1
    kept = list(points[::every])
    if points and kept[-1] is not points[-1]:
        kept.append(points[-1])
    return kept


def _records(
    run: Run, dataset: Dataset, steps: Sequence[int], num_batches: int, tell: Tell
) -> list[Record]:
    """Returns the routing of the same held-out rows at each of the checkpoints."""
    cfg = run.config
    # Compiled once: the checkpoints differ in their weights alone.
    record_of = held_out.make_record(cfg.model, probe.ROUTING)
    records = []
    for step in steps:
        tell(f"routing of step {step}")
        at = run.at(step)
        opened = held_out.open_run(cfg, dataset, at.judged, at.router_state, num_batches)
        parts = []
        for number, batch in enumerate(opened.batches):
            on_mesh = held_out.put_batch(opened, batch)
            fields = record_of(at.judged, at.router_state, on_mesh)
            parts.append(_flat(fields, batch, number))
        records.append(in_order(_joined(parts, cfg.model.moe.num_experts)))
    return records


def _flat(fields: dict[str, np.ndarray], batch: Any, number: int) -> dict[str, np.ndarray]:
    """Returns the fields of Record of a batch, without padding; rows of later batches count on."""
    # Padding is of segment 0.
    is_text_BS = np.asarray(batch.segment_BS) > 0
    num_rows = len(is_text_BS)
    row_B1 = number * num_rows + np.arange(num_rows)[:, None]
    of_tokens = {
        "token": batch.tokens_BS,
        "position": batch.position_BS,
        "domain": batch.domain_BS,
        "row": np.broadcast_to(row_B1, is_text_BS.shape),
    }
    # A mask over [B, S] makes one list of tokens: [L, N, ...] and [N].
    layers = {name: fields[name][:, is_text_BS] for name in OF_LAYERS}
    return layers | {name: np.asarray(z)[is_text_BS] for name, z in of_tokens.items()}


def _joined(parts: Sequence[dict[str, np.ndarray]], num_experts: int) -> Record:
    """Returns the record of several batches."""
    fields: dict[str, Any] = {}
    for name in parts[0]:
        # Tokens are the second dimension of what every layer has.
        axis = 1 if name in OF_LAYERS else 0
        fields[name] = np.concatenate([part[name] for part in parts], axis)
    return Record(**fields, num_experts=num_experts)


def read_knockout(path: Path) -> dict[str, Any] | None:
    """Returns what `probe --what knockout` has written of one way; None where it has not."""
    if not path.exists():
        return None
    probed = json.loads(path.read_text(encoding="utf-8"))
    knockout = probed["knockout"]
    # One of them is shown: the expert is removed, or else the router goes around it.
    for way in ("removed", "around"):
        worth = knockout.get(way, {})
        if "change_LEZ" in worth:
            return {"way": way, "step": probed["step"], "domains": knockout["domains"], **worth}
    return None
