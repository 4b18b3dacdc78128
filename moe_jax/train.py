"""The training run, top to bottom."""

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import checkpoint, optim
from moe_jax.begin import begin
from moe_jax.config import rules, smoke
from moe_jax.data.batches import Batches, prefetch
from moe_jax.data.contract import Data
from moe_jax.data.load import Dataset
from moe_jax.decoding.sample import Settings, make_sampler
from moe_jax.evaluate import make_evaluate
from moe_jax.instruments import interference, picture, record, trace
from moe_jax.instruments.load_over_time import LoadOverTime
from moe_jax.models.decoder import why_not_decoded
from moe_jax.parallel import batch_rows, mesh
from moe_jax.plan import flops
from moe_jax.report import banner, metrics, tensorboard
from moe_jax.report.summary import Result
from moe_jax.runtime import shell, signals, starts, stopping
from moe_jax.runtime.clock import StepClock
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS
from moe_jax.tasks.contract import Task, Trained
from moe_jax.terminal.progress import Progress
from moe_jax.train_step import (
    State,
    initial,
    judged,
    make_model,
    make_step,
    make_tx,
    parameter_names,
)

IN_FLIGHT = {
    "cpu": 2,
    "gpu": 8,
    "tpu": 8,
}  # steps queued on the devices; more than a few deadlock simulated CPU devices


def run(
    cfg: Config,
    raw: Mapping[str, Any],
    defaults: Mapping[str, Any],
    workdir: Path,
    started: float,
    name: str = "",
) -> Result:
    """Trains until train.steps (or a signal), from the newest checkpoint of `workdir` if it has
    one.

    `raw` is the config as a nested dict of JSON values: it is saved with the run and compared on
    resume, and `defaults` (configs/base.py) stands for the keys that a run saved long ago lacks.
    The mesh is set by the caller. `started`: time.monotonic() when the process began. `name`: of
    the config, to be shown. Raises UserError, and stopping.NonFinite.
    """
    lock = (
        shell.held(workdir, "--workdir")
        if jax.process_index() == 0
        else contextlib.nullcontext(shell.FREE)
    )
    with signals.listening() as heard, lock as held:
        try:
            return in_workdir(cfg, raw, defaults, workdir, held, heard, started, name)
        finally:
            heard.release()


def in_workdir(
    cfg: Config,
    raw: Mapping[str, Any],
    defaults: Mapping[str, Any],
    workdir: Path,
    held: shell.Held,
    heard: signals.Listener,
    started: float,
    name: str,
) -> Result:
    """`run` in a workdir that is locked, with the signals listened to."""
    main = jax.process_index() == 0
    task = TASKS[cfg.task]
    progress = Progress(active=main)
    banner.show(progress, cfg, workdir, name)
    with progress.doing("opening the data"):
        data = task.open(cfg)
        if cfg.smoke:
            data = smoke.fewer(cfg, data)
        batches = Batches(data, "train", cfg.seed, cfg.train.batch_size)
    banner.show_data(progress, data)
    rows = batch_rows.local_rows(cfg.train.batch_size)

    # Model and state
    model = make_model(cfg.model)
    init = jax.jit(initial(cfg, model))
    with progress.doing("building the model"):
        abstract = jax.eval_shape(init, jax.random.key(cfg.seed))
    names = parameter_names(abstract.params)
    step_fn = jax.jit(make_step(cfg, model, make_tx(cfg, abstract.params)), donate_argnums=0)
    difference_norm, copy = (
        jax.jit(optim.difference_norm),
        jax.jit(lambda tree: jax.tree.map(jnp.copy, tree)),
    )
    saves = checkpoint.Checkpoints(
        workdir / "checkpoints",
        every=cfg.checkpoint.every,
        keep=cfg.checkpoint.keep,
        keep_best=cfg.checkpoint.keep_best,
    )
    metadata = {"config": raw, "data": data.fingerprint}
    with progress.doing(
        "restoring the newest checkpoint" if saves.directory.exists() else "making the parameters"
    ):
        state, notes = begin(cfg, saves, metadata, defaults, init, abstract, data)
    start = int(state.step)
    banner.show_start(progress, cfg, start)
    last = min(cfg.train.steps, cfg.train.stop_at or cfg.train.steps)

    # What is written, and what is shown
    lengths = mesh.of(jax.sharding.get_mesh())
    metrics.write_run_info(workdir, raw, mesh=lengths._asdict(), active=main)
    notes += [
        *data.notes,
        *rules.advice(cfg),
        *(starts.changed_code(workdir) if main and start else []),
    ]
    for note in notes:
        progress.message(note)
    with progress.doing("opening the files of the run"):
        if main:
            data.save(workdir)
        tokens_per_step = cfg.train.batch_size * cfg.data.seq_len
        step_flops = flops.train_per_token(cfg.model, cfg.data.seq_len) * tokens_per_step
        writer = metrics.Writer(
            workdir,
            resume_step=start,
            evaluates_again=start >= last,
            tensorboard=cfg.log.tensorboard,
            active=main,
            started=started,
            per_step=metrics.PerStep(tokens_per_step, step_flops),
        )
        writer.text(start, "config", f"```json\n{json.dumps(raw, indent=1)}\n```")
        writer.hyperparameters(tensorboard.hyperparameters(raw, defaults))
    evaluate, sampler = make_evaluate(cfg, data), None
    if isinstance(data, Dataset) and cfg.eval.sample_tokens:
        silent = why_not_decoded(cfg.model)
        sampler = None if silent else make_sampler(cfg.model, data.tokenizer, cfg.data.seq_len)
        if silent:
            progress.message(f"no samples will be drawn: {silent}")
    profile = trace.Profile(cfg.profile, workdir)
    recorder = record.make_recorder(cfg, model, data.domains, workdir / "routing")
    meter = interference.make_meter(cfg, model) if cfg.log.interference_every else None
    records, load = record.recorded(cfg), LoadOverTime(cfg.model.moe.num_experts)
    with progress.doing("measuring the peak FLOP/s") if start < last else contextlib.nullcontext():
        peak = (
            flops.measure_peak(cfg.model.dtype) * jax.process_count() if start < last else math.nan
        )
    clock = StepClock(tokens_per_step, step_flops=step_flops, peak=peak)
    evaluation: dict[str, Any] = {}
    sample = ""

    def evaluate_now(state: State, final: bool) -> tuple[dict[str, Any], str]:
        with progress.doing("evaluating", after=state.step):
            result = evaluate(state, cfg.eval.final_batches if final else cfg.eval.batches)
        if final:
            trained = Trained(model.bind, judged(state), state.router_state, result["rows"])
            with progress.doing("writing predictions"):
                result |= task.finish(cfg, trained, data, workdir)
        text = ""
        if sampler:
            settings = Settings(
                cfg.eval.sample_tokens, temperature=0.8, top_k=0, top_p=0.95, seed=cfg.seed, stop=()
            )
            prompt = cfg.eval.sample_prompt
            with progress.doing("drawing a sample"):
                text = prompt + sampler(judged(state), state.router_state, [prompt], settings)[0]
        if main:
            with progress.doing("writing what was evaluated"):
                publish(
                    task,
                    int(state.step),
                    result,
                    text,
                    data,
                    writer,
                    progress,
                    load,
                    workdir if final else None,
                )
        return result, text

    # The loop
    pending: deque[tuple[int, dict[str, Any]]] = deque()
    source = prefetch(batches, start, last, rows, cfg.data.prefetch)
    try:
        # several processes end here together, if one was told to before its first step
        stopping.check()
        progress.start(start, last, clock)
        for step in range(start, last):
            score = None
            if profile.begins(step):
                with progress.doing("starting the profile", after=state.step):
                    profile.begin(step, state)
            with clock.waiting():
                batch = batch_rows.put(next(source), rows, cfg.train.batch_size)
            if records(step + 1):
                with progress.doing("recording the routing", after=state.step):
                    recorder(step + 1, state, batch)  # before the step takes the state away
            if meter and (step + 1) % cfg.log.interference_every == 0:
                with progress.doing("measuring interference", after=state.step):
                    writer.write(step + 1, meter(state, batch))
            logged = (step + 1) % cfg.log.every == 0 or step + 1 == last or step == start
            before = copy(state.params) if logged else None
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = step_fn(state, batch)
            if logged:
                values["update_norm"] = difference_norm(state.params, before)
            pending.append((step + 1, values))
            if len(pending) >= IN_FLIGHT.get(jax.default_backend(), 8):
                finish(cfg, pending.popleft(), names, saves)
            saves.poll()
            done = step + 1
            if step == start:
                jax.block_until_ready(state.step)
                heard.note()
                progress.message(
                    f"first step done {time.monotonic() - started:.1f} s after the start"
                )
            stop = stopping.due(done, start, cfg.log.every)
            if profile.ends(done, done == last or stop):
                with progress.doing("reading the profile", after=state.step):
                    for line in profile.end(done, done == last or stop, step_fn, state, batch):
                        progress.message(line)
            due = (
                (cfg.eval.every and done % cfg.eval.every == 0)
                or saves.due(done)
                or done == last
                or stop
            )
            if logged or stop:
                held.check()
                row = log_row(values)
                progress.update(done, loss=row["train/loss"], balance=row.get("moe/load_max"))
                writer.write(done, row | {"train/epoch": batches.epoch(done), **clock.figures()})
            if (
                writer.shows_images
                and done % cfg.log.histogram_every == 0
                and "counts" in values["moe"]
            ):
                load.note(done, values["moe"]["counts"])
            while due and pending:  # nothing is evaluated or saved before it is known to be finite
                finish(cfg, pending.popleft(), names, saves)
            progress.stepped(done - len(pending))
            if stop:
                raise stopping.Interrupted
            if (cfg.eval.every and done % cfg.eval.every == 0) or done == last:
                evaluation, sample = evaluate_now(state, done == last)
                score = evaluation[
                    "loss"
                ]  # of this very state: a checkpoint of a later step has none
            if saves.due(done) or done == last:
                held.check()
                with progress.doing("saving", after=state.step):
                    saves.save(done, state, metadata=metadata, score=score, stacked=cfg.model.scan)
        if start >= last:
            evaluation, sample = evaluate_now(state, True)
    except stopping.Interrupted:  # between two steps, or two batches of an evaluation
        held.check()
        saves.save(int(state.step), state, metadata=metadata, score=None, stacked=cfg.model.scan)
    finally:
        with contextlib.closing(progress), progress.doing("finishing the last save"):
            close_all(source, profile, writer, saves)  # the last save is on disk when this returns
    return Result(
        int(state.step), heard.release(), evaluation, data, clock.tokens_per_second, sample
    )


def close_all(*things: Any) -> None:
    """Closes all of them, in order, also when one cannot be closed; the error of that is raised
    then.
    """
    with contextlib.ExitStack() as stack:
        for thing in reversed(things):
            stack.callback(thing.close)


def publish(
    task: Task,
    step: int,
    result: Mapping[str, Any],
    sample: str,
    data: Data,
    writer: metrics.Writer,
    progress: Progress,
    load: LoadOverTime,
    pictures: Path | None,
) -> None:
    """Writes and shows an evaluation; `pictures`: where that of the routing goes, at the end of a
    run and only there.
    """
    # Numbers alone: a translation's figures have the signature of its BLEU among them.
    figures = {
        f"eval/{name}": value for name, value in result.items() if isinstance(value, int | float)
    }
    if pictures:
        writer.write_final(step, figures, [name for name in figures if "/domain/" not in name])
    else:
        writer.write(step, figures)
    progress.message(f"step {step}: {task.headline(result)}")
    if writer.shows_images and load:
        writer.image(step, "moe/load", load.picture())
    if sample:
        writer.text(step, "sample", "    " + sample.replace("\n", "\n    "))
    stopping.check_alone()
    if pictures and result["routing"].size:
        rows = result["row_routing"]
        seen = result["routing"], rows["experts"], rows["domain"], data.domains
        writer.image(step, "moe/routing", picture.routing(*seen, pictures / "routing.png"))


def finish(
    cfg: Config, entry: tuple[int, dict[str, Any]], names: list[str], saves: checkpoint.Checkpoints
) -> None:
    """Waits for a step, and stops the run when too many in a row were not finite."""
    step, values = entry
    skipped = int(values["skipped"])
    if skipped <= cfg.train.nonfinite_patience:
        return
    parameter = stopping.first_broken(names, np.asarray(values["finite_leaves"]))
    good = saves.latest()
    where = (
        "no checkpoint yet"
        if good is None
        else f"last good checkpoint: step {good} in {saves.directory}"
    )
    raise stopping.NonFinite(
        f"step {step}: loss {float(values['loss'])}, gradient norm {float(values['grad_norm'])}: "
        f"not finite {skipped} time(s) in a row "
        f"(train.nonfinite_patience = {cfg.train.nonfinite_patience}); the gradient of {parameter} "
        f"went wrong first; {where}"
    )


def log_row(values: Mapping[str, Any]) -> dict[str, float]:
    """One row of metrics.jsonl: scalars of the step, MoE figures as means over layers and for each
    layer.
    """
    host = jax.device_get(values)
    row = {
        f"train/{name}": float(v) for name, v in host.items() if np.ndim(v) == 0 and name != "moe"
    }
    for name, value_L in host["moe"].items():
        if name == "counts":
            continue
        row[f"moe/{name}"] = float(value_L.mean())
        row |= {f"moe/layer_{layer}/{name}": float(v) for layer, v in enumerate(value_L)}
    return row
