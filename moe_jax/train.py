"""The training run, top to bottom."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

from moe_jax import checkpoint, optim
from moe_jax.begin import begin
from moe_jax.config import advice, allow_float64, build, command_line, smoke
from moe_jax.data.batches import Batches, prefetch
from moe_jax.data.contract import Data
from moe_jax.instruments import interference, record, trace
from moe_jax.instruments.load_over_time import LoadOverTime
from moe_jax.loop import Calendar, InFlight
from moe_jax.models.functions import Model, make_model
from moe_jax.parallel import batch_rows, mesh
from moe_jax.parallel.compile_cache import CompileCache
from moe_jax.plan import flops
from moe_jax.publish import Evaluation
from moe_jax.report import banner, metrics, tensorboard
from moe_jax.report.step_row import CollapseAlert, log_row
from moe_jax.report.summary import Result
from moe_jax.report.trackers import Trackers, require
from moe_jax.report.trackers.contract import Start
from moe_jax.runtime import agreement, memory, shell, signals, starts, stopping
from moe_jax.runtime.clock import StepClock
from moe_jax.runtime.faults import Injector
from moe_jax.runtime.goodput import Goodput
from moe_jax.runtime.watchdog import WATCHDOG
from moe_jax.schema.config import Config
from moe_jax.tasks import TASKS
from moe_jax.terminal.progress import Progress
from moe_jax.train_step import State, jit_initial, jit_step, make_tx, parameter_names

FOREVER = 1e6  # seconds


class Job(NamedTuple):
    """Holds what a run is asked to do."""

    cfg: Config
    # The config as a nested dict of JSON values.
    raw: Mapping[str, Any]
    workdir: Path
    # time.monotonic() when the process began.
    started: float
    # The name of the config, to be shown.
    name: str
    # Keys that may differ from those of the checkpoint it goes on from.
    allowed: tuple[str, ...]


def run(
    cfg: Config,
    raw: Mapping[str, Any],
    workdir: Path,
    started: float,
    name: str = "",
    allowed: tuple[str, ...] = (),
) -> Result:
    """Trains until train.steps (or a signal), from the newest checkpoint of `workdir` if it has
    one.

    `raw` is saved with the run and compared on resume. The mesh is set by the caller. The arguments
    are those of Job. Raises UserError, and stopping.NonFinite.
    """
    job = Job(cfg, raw, workdir, started, name, allowed)
    lock = contextlib.nullcontext(shell.FREE)
    # A run has one lock, however many processes: that of process 0.
    if jax.process_index() == 0:
        lock = shell.held(workdir, "--workdir")
    with signals.listening() as listener, lock as held:
        limits = cfg.limits
        stacks = workdir / "stacks" / f"process_{jax.process_index()}.txt"
        WATCHDOG.start(step=limits.step, other=limits.other, grace=limits.grace, stacks=stacks)
        try:
            return in_workdir(job, held, listener)
        finally:
            WATCHDOG.stop()
            listener.release()


def from_config(config: str, workdir: str | Path, *changes: str) -> Result:
    """Trains a config on the devices that are there, and returns how the run ended.

    The same call again goes on from the newest checkpoint, as the command does.

    Args:
      config: a config file, or the name of a shipped config ("vision:digits").
      workdir: where checkpoints, metrics and samples go.
      changes: as on a command line, "--config.KEY=VALUE".

    Raises UserError, and stopping.NonFinite.
    """
    started = time.monotonic()
    shell.refuse_address(str(workdir), "workdir")
    raw = command_line.read(Path(config), changes)
    allow_float64(raw)
    cfg = build(raw, len(jax.devices()))
    with jax.set_mesh(mesh.make(cfg.mesh, slow_axis=cfg.mesh_slow_axis)):
        return run(cfg, raw, Path(workdir), started, config)


def in_workdir(job: Job, held: shell.Held, listener: signals.Listener) -> Result:
    """Does what `run` says, in a workdir that is locked, with the signals listened to."""
    cfg, workdir = job.cfg, job.workdir
    require(cfg.log.trackers)
    main = jax.process_index() == 0
    cache = CompileCache(cfg.compile_cache)
    goodput = Goodput(job.started)
    progress = Progress(active=main, goodput=goodput)
    # First, so that a person sees what was asked for while the rest takes its time.
    banner.show(progress, cfg, workdir, job.name)
    if cache.note:
        progress.message(cache.note)

    # Data
    data = open_data(cfg, progress)
    # Every process opens the data by itself: they may lie on different disks.
    agreement.compare("data", {"fingerprint": data.fingerprint}, cfg.limits.other or FOREVER)
    batches = Batches(data, "train", cfg.seed, cfg.train.batch_size)
    banner.show_data(progress, data)
    rows = batch_rows.local_rows(cfg.train.batch_size)

    # Model and state
    model = make_model(cfg.model)
    init = jit_initial(cfg, model)
    with progress.doing("building the model"):
        # Shapes, dtypes and placements alone: nothing is computed yet.
        abstract = jax.eval_shape(init, jax.random.key(cfg.seed))
    tx = make_tx(cfg, abstract.params)
    step_fn = jit_step(cfg, model, tx)
    norms = jax.jit(optim.norms)
    copied = jax.jit(optim.copied)
    saves = open_saves(cfg, workdir)
    # Saved with every checkpoint, and compared when a run goes on from one.
    metadata = {"config": job.raw, "data": data.fingerprint}
    source = "restoring the newest checkpoint" if saves.directory.exists() else None
    with progress.doing(source or "making the parameters"):
        state, notes = begin(cfg, saves, metadata, init, abstract, data, job.allowed)
    start = int(state.step)
    # A workdir that the processes do not share has checkpoints for one of them alone.
    agreement.compare("checkpoint in --workdir", {"step": start}, cfg.limits.other or FOREVER)
    # train.stop_at ends this start earlier; the schedule is still that of train.steps.
    last = min(cfg.train.steps, cfg.train.stop_at or cfg.train.steps)
    due = Calendar(cfg, saves, start, last)
    banner.show_start(progress, cfg, start)

    # What is written, and what is shown
    writer = open_files(job, data, due, notes, progress)
    if main:
        goodput.open(workdir, start)
    load = LoadOverTime(cfg.model.moe.num_experts)
    evaluation = Evaluation(cfg, model, data, workdir, writer, progress, load)
    profile = trace.Profile(cfg.profile, workdir)
    recorder = record.make_recorder(cfg, model, data.domains, workdir / "routing")
    measure_interference = make_interference_meter(cfg, model)
    clock = StepClock(*size_of_step(cfg))
    alert = CollapseAlert(progress)
    faults = Injector(cfg.faults, workdir, jax.process_index())
    in_flight = InFlight(cfg, parameter_names(abstract.params), saves)

    # The loop
    stream = prefetch(batches, start, last, rows, cfg.data.prefetch)
    try:
        # Several processes end here together, if one was told to before its first step.
        stopping.check()
        progress.start(start, last, clock)
        for step in range(start, last):
            done = step + 1
            score = None
            faults.before(done)
            if profile.begins(step):
                with progress.doing("starting the profile", after=state.step):
                    profile.begin(step, state)
            with clock.waiting(), goodput.doing("waiting for data"):
                batch = batch_rows.put(next(stream), rows, cfg.train.batch_size)
            # Before the step takes the state away.
            if due.records_routing(done):
                with progress.doing("recording the routing", after=state.step):
                    recorder(done, state, batch)
            if measure_interference and due.measures_interference(done):
                with progress.doing("measuring interference", after=state.step):
                    writer.write(done, measure_interference(state, batch))
            logs = due.logs(done)
            # A copy, because the state is donated to the step: the new one takes its memory.
            before = copied(state.params) if logs else None
            if step == start:
                compare_programs(step_fn, state, batch, cfg.limits.other or FOREVER)

            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = step_fn(state, batch)

            if logs:
                values |= norms(state.params, before)
            in_flight.add(done, values)
            saves.poll()
            if step > start:
                WATCHDOG.step_done()
            else:
                wait_for_first(state, job, cache, progress, listener)
                with progress.doing("measuring the peak FLOP/s"):
                    clock.peak = flops.peak(cfg.model.dtype)
            stop = stopping.due(done, start, cfg.log.every)
            ends = done == last or stop
            if profile.ends(done, ends):
                with progress.doing("reading the profile", after=state.step):
                    for line in profile.end(done, ends, step_fn, state, batch):
                        progress.message(line)
            if logs or stop:
                held.check()
                row = log_row(values)
                alert.look(done, row)
                progress.update(done, loss=row["train/loss"], balance=row.get("moe/load_max"))
                row |= {"train/epoch": batches.epoch(done), "perf/goodput": goodput.share(done)}
                writer.write(done, row | clock.figures())
                goodput.write(done)
            if writer.shows_images and due.notes_load(done) and "counts" in values["moe"]:
                load.note(done, values["moe"]["counts"])
            # Nothing that might not be finite is evaluated or saved.
            if due.evaluates(done) or due.saves_state(done) or stop:
                in_flight.wait_for_all()
            progress.stepped(done - len(in_flight))
            if stop:
                raise stopping.Interrupted
            if due.evaluates(done):
                # Of this very state: a checkpoint of a later step has no score.
                score = evaluation(state, final=done == last)
            if due.saves_state(done):
                held.check()
                with progress.doing("saving", after=state.step):
                    saves.save(done, state, metadata=metadata, score=score, stacked=cfg.model.scan)
                    cache.keep()
        # A finished run that is started again makes no step, and evaluates.
        if start >= last:
            evaluation(state, final=True)
    # Between two steps, or between two batches of an evaluation.
    except stopping.Interrupted:
        held.check()
        done = int(state.step)
        with progress.doing("saving"):
            saves.save(done, state, metadata=metadata, score=None, stacked=cfg.model.scan)

    # Wind down: the last save is on disk when this returns.
    finally:
        with contextlib.closing(progress), progress.doing("finishing the last save"):
            close_all(stream, profile, writer, saves)
            cache.keep()
    # From here on all is saved: a signal ends the process at once.
    signal, done = listener.release(), int(state.step)
    goodput.write(done)
    speed, spent = clock.tokens_per_second, goodput.text(done)
    return Result(done, signal, evaluation.figures, data, speed, evaluation.sample, spent)


def open_saves(cfg: Config, workdir: Path) -> checkpoint.Checkpoints:
    """Returns the checkpoints of a workdir."""
    return checkpoint.Checkpoints(
        workdir / "checkpoints",
        every=cfg.checkpoint.every,
        keep=cfg.checkpoint.keep,
        keep_best=cfg.checkpoint.keep_best,
    )


def make_interference_meter(cfg: Config, model: Model) -> Callable[..., Any] | None:
    """Returns what measures how losses interfere; None where nobody asks for it."""
    return interference.make_meter(cfg, model) if cfg.log.interference_every else None


def wait_for_first(
    state: State,
    job: Job,
    cache: CompileCache,
    progress: Progress,
    listener: signals.Listener,
) -> None:
    """Waits for the first step, which has compiled: from here on there is something to save."""
    jax.block_until_ready(state.step)
    WATCHDOG.step_done()
    memory.collect_as_usual()
    listener.note()
    seconds = time.monotonic() - job.started
    kept = f"; {cache.hits} programs were compiled before" if cache.hits else ""
    progress.message(f"first step done {seconds:.1f} s after the start{kept}")


def compare_programs(step_fn: Any, state: State, batch: Any, timeout: float) -> None:
    """Raises Drift when the processes of the run would not run the same program.

    Different programs wait for each other in collectives that never meet. One process alone is not
    lowered twice.
    """
    if jax.process_count() == 1:
        return
    program = step_fn.lower(state, batch).as_text()
    digest = hashlib.sha256(program.encode()).hexdigest()[:16]
    agreement.compare("program", {"digest": digest}, timeout)


def open_data(cfg: Config, progress: Progress) -> Data:
    """Returns the data of the task; of a smoke run some rows of them."""
    with progress.doing("opening the data"):
        data = TASKS[cfg.task].open(cfg)
        return smoke.fewer(cfg, data) if cfg.smoke else data


def open_files(
    job: Job, data: Data, due: Calendar, notes: list[str], progress: Progress
) -> metrics.Writer:
    """Tells the notes of the run, and returns what writes its figures."""
    cfg, workdir = job.cfg, job.workdir
    main = jax.process_index() == 0
    lengths = mesh.of(jax.sharding.get_mesh())
    metrics.write_run_info(workdir, job.raw, mesh=lengths._asdict(), active=main)
    changed = []
    if main and due.start:
        changed = starts.changed_code(workdir) + starts.changed_mesh(workdir)
    for note in (*notes, *data.notes, *advice.notes(cfg), *changed):
        progress.message(note)
    with progress.doing("opening the files of the run"):
        if main:
            data.save(workdir)
        tokens, step_flops = size_of_step(cfg)
        writer = metrics.Writer(
            workdir,
            resume_step=due.start,
            evaluates_again=due.start >= due.last,
            tensorboard=cfg.log.tensorboard,
            active=main,
            started=job.started,
            per_step=metrics.PerStep(tokens, step_flops),
            trackers=open_trackers(job, progress) if main and cfg.log.trackers else None,
        )
        writer.text(due.start, "config", f"```json\n{json.dumps(job.raw, indent=1)}\n```")
        writer.hyperparameters(tensorboard.hyperparameters(job.raw))
    return writer


def open_trackers(job: Job, progress: Progress) -> Trackers:
    """Returns the trackers of the run, which go on where an earlier start of it ended."""
    flat = flatten_dict(dict(job.raw), sep=".")
    start = Start(job.workdir, job.cfg.log.project, flat, identity="")
    opened = Trackers(job.cfg.log.trackers, start, progress.message)
    for name, where in opened.where.items():
        progress.message(f"{name:8} {where}")
    return opened


def size_of_step(cfg: Config) -> tuple[int, int]:
    """Returns the tokens and the useful FLOPs of an optimizer step."""
    tokens = cfg.train.batch_size * cfg.data.seq_len
    return tokens, flops.train_per_token(cfg.model, cfg.data.seq_len) * tokens


def close_all(*things: Any) -> None:
    """Closes all of them, in order, also when one cannot be closed.

    The error of that is raised then.
    """
    with contextlib.ExitStack() as stack:
        # A stack closes the last one first.
        for thing in reversed(things):
            stack.callback(thing.close)
