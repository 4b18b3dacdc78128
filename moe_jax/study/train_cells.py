"""Trains the cells of a pack in one process: they share data, compiled programs and the process.

Seed and learning rate are arguments of the compiled step, so cells that differ in nothing else are
compiled once. The loop has no checkpoints, pictures and samples: a cell takes minutes.
"""

import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax import config, exit_codes
from moe_jax.config import smoke
from moe_jax.data.batches import Batches, prefetch
from moe_jax.data.contract import Data
from moe_jax.errors import UserError
from moe_jax.evaluate import make_evaluate
from moe_jax.models.functions import make_model
from moe_jax.parallel import batch_rows, compiling, mesh
from moe_jax.plan import flops
from moe_jax.runtime import shell
from moe_jax.study import begun, expand, ledger
from moe_jax.study.contract import Cell, Figures
from moe_jax.study.measures import MEASURES, Trained
from moe_jax.tasks import TASKS
from moe_jax.train_step import initial, make_step, make_tx

# Points of the training curve that a cell keeps.
POINTS = 60
# Steps between two points of the curve of the experts' density, where they have zeros.
DENSITY_EVERY = 5
# The last share of the steps, over which figures of training are averaged.
END = 0.1
# Steps whose metrics are read at once, so that the device is not waited for at every step.
READ_EVERY = 20


class Program(NamedTuple):
    """Holds what the cells of a pack share. `init` and `step` take seed and learning rate first.

    `data` is that of the first cell: held-out rows are the same for all, training rows are not.
    `parents` has the programs and states of the dense models that cells begin from, by their
    programs and keys, as soon as there are any.
    """

    cfg: config.Config
    data: Data
    init: Callable[..., Any]
    step: Callable[..., Any]
    # Bytes of the arguments, results and temporary arrays of a step.
    memory: int
    evaluate: Callable[..., Any]
    bind: Callable[..., Any]
    parents: dict[str, Any]


def nothing_more() -> list[Cell]:
    """Returns no cells: for a pack after which nothing is asked."""
    return []


def run_pack(
    cells: Sequence[Cell], study: str, out: Path, following: Callable[[], list[Cell]] = nothing_more
) -> int:
    """Trains the cells one after the other and writes a line in the ledger for each.

    A cell that fails does not stop the others. Returns the exit code of the last failure, 0 if
    there is none.

    Args:
      following: returns the cells that the ledger asks for by now, such as the next learning rate
        of a search and then the seeds. Those that were tried here are not tried again.
    """
    worst = exit_codes.DONE
    # The program of the last cell. One at a time: each holds its data and its compiled code.
    programs: dict[str, Program] = {}
    for cell in _and_following(cells, following):
        began, used = time.monotonic(), time.process_time()
        try:
            if cell.program not in programs:
                programs = {cell.program: prepare(cell)}
            figures, facts = train(programs[cell.program], cell)
        # A config that cannot be trained is told in one line.
        except UserError as error:
            worst = error.code
            ledger.write(out, study, cell, worst, reason=str(error), **cpu_since(used))
            shell.tell(f"failed: {told(cell)}: {error}", sys.stderr)
        # Anything else is a fault: with its traceback, and the next cell is trained all the same.
        except Exception as error:
            worst = exit_codes.INTERNAL
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            ledger.write(out, study, cell, worst, reason=reason, **cpu_since(used))
        else:
            facts |= cpu_since(used)
            ledger.write(out, study, cell, exit_codes.DONE, figures=figures, **facts)
            seconds = time.monotonic() - began
            shown = figures.get("bits_per_byte", figures["loss"])
            loss = "diverged" if shown is None else f"{shown:.4f}"
            shell.tell(f"{told(cell)}: {loss} ({seconds:.0f} s)")
    return worst


def _and_following(cells: Sequence[Cell], following: Callable[[], list[Cell]]) -> Iterator[Cell]:
    """Yields cells, and then those that follow from them until there are none."""
    tried: set[str] = set()
    waiting = list(cells)
    while waiting:
        tried |= {cell.key for cell in waiting}
        yield from waiting
        # Asked when all of them are in the ledger: a search goes on from its figures.
        waiting = [cell for cell in following() if cell.key not in tried]


def cpu_since(used: float) -> dict[str, float]:
    """Returns the processor time of a cell, all cores together, with the compilation before it."""
    return {"cpu_seconds": time.process_time() - used}


def told(cell: Cell) -> str:
    """Returns a cell as a line of the terminal names it."""
    return f"{cell.arm}, seed {cell.seed}, rate {cell.rate:g}"


def prepare(cell: Cell) -> Program:
    """Returns the data and the compiled programs of a cell."""
    cfg = config.build(cell.raw, 1)
    config.allow_float64(dict(cell.raw))
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        data = open_data(cfg)
        model = make_model(cfg.model)

        def of_cell(seed: Any, rate: Any) -> config.Config:
            # Both are traced numbers here, so one program serves all seeds and rates.
            optim = dataclasses.replace(cfg.optim, learning_rate=rate)
            return dataclasses.replace(cfg, seed=seed, optim=optim)

        def init(seed: Any, rate: Any) -> Any:
            return initial(of_cell(seed, rate), model)(jax.random.key(seed))

        def step(seed: Any, rate: Any, state: Any, batch: Any) -> Any:
            now = of_cell(seed, rate)
            return make_step(now, model, make_tx(now, state.params))(state, batch)

        # Any batch will do: the step is compiled for its shapes.
        rows = batch_rows.local_rows(cfg.train.batch_size)
        local = Batches(data, "train", 0, cfg.train.batch_size).rows(0, rows)
        batch = batch_rows.put(local, rows, cfg.train.batch_size)
        arguments = inputs(cell)
        init_fn = jax.jit(init, compiler_options=compiling.runs_once())
        state = jax.eval_shape(init_fn, *arguments)
        # The state is donated: the new one takes its memory.
        compiled = jax.jit(step, donate_argnums=2).lower(*arguments, state, batch).compile()
        evaluate = make_evaluate(cfg, data)
    return Program(cfg, data, init_fn, compiled, memory_of(compiled), evaluate, model.bind, {})


def open_data(cfg: config.Config) -> Data:
    """Returns the data of a cell: the order of documents in its rows follows from the seed."""
    data = TASKS[cfg.task].open(cfg)
    return smoke.fewer(cfg, data) if cfg.smoke else data


def inputs(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """Returns seed and learning rate as the compiled programs take them."""
    return np.asarray(cell.seed, np.int32), np.asarray(cell.rate, np.float32)


def memory_of(compiled: Any) -> int:
    """Returns the bytes that a step needs: arguments, results that are not theirs, temporaries."""
    analysis = compiled.memory_analysis()
    # Not every platform has one.
    if analysis is None:
        return 0
    arguments, results = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    # A result in the memory of a donated argument would be counted twice.
    in_place = analysis.alias_size_in_bytes
    return int(arguments + results - in_place + analysis.temp_size_in_bytes)


def train(program: Program, cell: Cell) -> tuple[Figures, dict[str, Any]]:
    """Trains one cell; returns its figures, and what the ledger says beside them.

    A run whose loss is not finite ends there: it has the figure "diverged" 1, and None for the
    held-out figures.
    """
    cfg = dataclasses.replace(program.cfg, seed=cell.seed)
    # The program has the data of the seed that it was prepared with.
    data = program.data if cell.seed == program.cfg.seed else open_data(cfg)
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        began = time.monotonic()
        state, rows, seconds = _steps(program, cell, data)
        # A run ends at the first loss that is not finite.
        diverged = not math.isfinite(rows[-1]["loss"])
        figures = {**_of_config(program), **_of_training(cfg, rows, seconds)}
        figures["diverged"] = int(diverged)
        batches = Batches(data, "train", cell.seed, cfg.train.batch_size)
        figures["epochs"] = batches.epoch(cfg.train.steps)
        if diverged:
            figures |= {"loss": None, "bits_per_byte": None}
        else:
            trained = Trained(cfg, data, program.bind, state)
            figures |= _held_out(program, state)
            for name in cell.measures:
                figures |= MEASURES[name](trained)
    facts = {"data": data.fingerprint, "seconds": time.monotonic() - began}
    return {name: _finite(value) for name, value in figures.items()}, facts


def _steps(program: Program, cell: Cell, data: Data) -> tuple[Any, list[dict[str, float]], float]:
    """Returns the state at the end, a row of metrics for each step, and the seconds of a step."""
    cfg, steps = program.cfg, program.cfg.train.steps
    size = cfg.train.batch_size
    rows = batch_rows.local_rows(size)
    stream = prefetch(Batches(data, "train", cell.seed, size), 0, steps, rows, cfg.data.prefetch)
    seed, rate = inputs(cell)
    state = program.init(seed, rate)
    if cell.parent is not None:
        state = begun.upcycled(cell, state, _parent(program, cell.parent))
    found: list[dict[str, float]] = []
    # Of steps that nobody has read yet: their metrics are still on the device.
    waiting: list[dict[str, Any]] = []
    began = time.monotonic()
    try:
        for step, local in enumerate(stream, 1):
            state, values = program.step(seed, rate, state, batch_rows.put(local, rows, size))
            waiting.append(_small(values))
            if step % READ_EVERY == 0 or step == steps:
                found += [_row(each) for each in jax.device_get(waiting)]
                waiting = []
                if not all(math.isfinite(row["loss"]) for row in found[-READ_EVERY:]):
                    break
    finally:
        stream.close()
    seconds = (time.monotonic() - began) / len(found)
    # Steps behind the first loss that is not finite were made before anybody had read it.
    for i, row in enumerate(found):
        if not math.isfinite(row["loss"]):
            return state, found[: i + 1], seconds
    return state, found, seconds


def _parent(program: Program, cell: Cell) -> Any:
    """Returns the state at the end of the run of a dense model, which is trained once."""
    kept = program.parents
    if cell.program not in kept:
        kept[cell.program] = prepare(cell)
    if cell.key not in kept:
        of_parent = kept[cell.program]
        data = open_data(dataclasses.replace(of_parent.cfg, seed=cell.seed))
        kept[cell.key], _, _ = _steps(of_parent, cell, data)
    return kept[cell.key]


def _small(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics of a step that a cell keeps, as arrays of the device."""
    kept = {name: z for name, z in values.items() if name != "moe" and np.ndim(z) == 0}
    # A number for each expert is too much for every step.
    return kept | {f"moe/{name}": z for name, z in values["moe"].items() if name != "counts"}


def _row(values: dict[str, Any]) -> dict[str, float]:
    """Returns the metrics of a step as numbers: means over MoE layers."""
    return {name: float(np.mean(value)) for name, value in values.items()}


def _of_config(program: Program) -> dict[str, Any]:
    """Returns the figures that follow from the config, and the memory of a step."""
    cfg = program.cfg
    counts = flops.parameters(cfg.model)
    # A dense model is one expert that every token takes.
    num_experts, granularity = 1, 1
    if cfg.model.num_moe_layers:
        num_experts = cfg.model.moe.num_experts
        granularity = flops.experts_per_token(cfg.model.moe)
    return {
        "steps": cfg.train.steps,
        "tokens": expand.tokens(cfg),
        "active_flops": flops.forward_per_token(cfg.model, cfg.data.seq_len).total,
        "train_flops": expand.train_flops(cfg),
        "total_parameters": counts.total,
        "active_parameters": counts.active,
        "active_body": counts.active_body,
        "num_experts": num_experts,
        "granularity": granularity,
        "memory": program.memory,
    }


def _of_training(
    cfg: config.Config, rows: Sequence[dict[str, float]], seconds: float
) -> dict[str, Any]:
    """Returns the curve, and means over the end of the run: "train_loss" is in nats per token."""
    last = rows[-max(1, round(END * len(rows))) :]
    figures: dict[str, Any] = {}
    for name in ("max_vio", "drop_fraction", "active", "load_entropy"):
        # A model without experts has none of them.
        if f"moe/{name}" in last[0]:
            figures[name] = float(np.mean([row[f"moe/{name}"] for row in last]))
    figures["train_loss"] = float(np.mean([row["nll"] for row in last]))
    norms = [row["grad_norm"] for row in rows if math.isfinite(row["grad_norm"])]
    figures["worst_grad_norm"] = max(norms, default=math.inf)
    figures["step_seconds"] = seconds
    if "expert_density" in rows[0]:
        steps = range(DENSITY_EVERY, len(rows) + 1, DENSITY_EVERY)
        figures["density_curve"] = [[step, rows[step - 1]["expert_density"]] for step in steps]
        figures["density"] = rows[-1]["expert_density"]
    # A point of the curve is the mean of the steps since the point before it.
    width = max(1, len(rows) // POINTS)
    curve = []
    for end in range(width, len(rows) + 1, width):
        mean = float(np.mean([row["nll"] for row in rows[end - width : end]]))
        # The last step of a run that diverged has no loss.
        if math.isfinite(mean):
            curve.append([end, mean])
    figures["curve"] = curve
    return figures


def _held_out(program: Program, state: Any) -> dict[str, Any]:
    """Returns the held-out figures that are numbers."""
    evaluated = program.evaluate(state, program.cfg.eval.final_batches)
    figures = {name: value for name, value in evaluated.items() if isinstance(value, float | int)}
    # Training has a figure of that name.
    if "max_vio" in figures:
        figures["heldout_max_vio"] = figures.pop("max_vio")
    return figures


def _finite(value: Any) -> Any:
    """Returns a value as JSON has it: None for a number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
