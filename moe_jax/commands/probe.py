"""`python -m moe_jax probe --workdir DIR --what replay,precision,knockout,interference,record`:
instruments on a trained model.

    replay         held-out loss under frozen, shuffled, balanced and random routing: what the
                   routing is worth; with --steps N after N more steps of training under each of
                   them
    precision      the share of routing decisions that hang on rounding; and with feed-forwards of
                   other numbers (--numbers) the held-out loss, too
    knockout       what each expert is worth, per domain: a table and heat maps
    interference   gradients of the language loss and of the auxiliary losses against each other
    record         the routing of the held-out batches, token by token

Everything is written to DIR/probe as JSON, PNG and npz, and the tables are printed.
docs/instruments.md explains them.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import rules
from moe_jax.data.batches import Batches
from moe_jax.errors import UserError
from moe_jax.instruments import (
    held_out,
    interference,
    knockout,
    numbers,
    picture,
    precision,
    record,
    replay,
    retrain,
    tables,
)
from moe_jax.models import MODELS
from moe_jax.moe import probe
from moe_jax.parallel import mesh
from moe_jax.parallel.batch_rows import local_rows, put
from moe_jax.run import Run, checkpoints, open_run
from moe_jax.runtime import shell
from moe_jax.schema.config import FFN_NUMBERS, Config
from moe_jax.schema.options import not_among
from moe_jax.tasks import TASKS
from moe_jax.tasks.lm import task as lm
from moe_jax.terminal import working
from moe_jax.terminal.table import Table
from moe_jax.train_step import State, jit_initial, make_model

# What an instrument prints: tables and sentences.
Output = list[Table | str]


class Job(NamedTuple):
    """Holds what every instrument of the command reads.

    `trained`: the run at its checkpoint; `out`: where files go, None on other processes.

    An instrument returns what is printed, and adds the files that it wrote to `written`.
    """

    # Of the training run; that of `run` may have another dispatcher.
    cfg: Config
    run: held_out.Run
    trained: Run
    flags: argparse.Namespace
    out: Path | None
    written: list[Path]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of the run that trained the model"
    )
    parser.add_argument("--what", default="replay,precision,knockout", help="default: %(default)s")
    parser.add_argument(
        "--batches", type=int, default=2, help="held-out batches, 0 = all (default 2)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=0, help="rows of a batch (default: as the run evaluates)"
    )
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument(
        "--frozen",
        default="",
        help="replay: steps of earlier checkpoints, such as 30,60 (default: all)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=0,
        help="replay: steps to train on under each routing (default 0)",
    )
    parser.add_argument(
        "--numbers",
        default=",".join(FFN_NUMBERS),
        help="precision: what feed-forwards are computed in instead (default: %(default)s; empty = "
        "leave it out)",
    )
    parser.add_argument(
        "--ways", default="removed,around", help="knockout: how an expert goes (default: both)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of shuffled and random routing, and of the intervals of knockout",
    )
    parser.add_argument("--mesh", default="1x1x1", help="DATAxEXPERTxMODEL (default: one device)")
    parser.add_argument(
        "--simulate_devices", type=int, default=0, help="CPU devices to simulate for a larger mesh"
    )
    parser.add_argument(
        "--coordinator", help="HOST:PORT of process 0, for a run of several processes"
    )
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs the instruments that are asked for. Raises UserError where one could not work."""
    flags = parse(argv)
    what = [name.strip() for name in flags.what.split(",")]
    unknown = [name for name in what if name not in INSTRUMENTS]
    if unknown:
        raise UserError(
            f"--what: {unknown[0]!r} is no instrument: choose from {', '.join(INSTRUMENTS)}"
        )
    refuse_wrong_flags(flags)
    start_devices(flags)
    trained = open_run(flags.workdir, flags.step)
    refuse_other(trained.config, flags.workdir)
    cfg = fitted(trained.config, flags)
    with jax.set_mesh(mesh.make(cfg.mesh, jax.devices()[: cfg.mesh.num_devices])):
        job = open_job(cfg, trained, flags)
        refused = measure(job, what)
    if job.out:
        tell_files(job)
    # At the end, for the other instruments have given their figures.
    if refused:
        raise UserError("\n".join(refused))
    return 0


def measure(job: Job, what: Sequence[str]) -> list[str]:
    """Runs the instruments and prints what each found; returns why some could not work."""
    refused, console = [], shell.console()
    for name in what:
        try:
            with working.shown(name, active=job.out is not None) as tell:
                output = INSTRUMENTS[name](job._replace(run=job.run._replace(tell=tell)))
        except UserError as error:
            # The others go on.
            refused.append(f"--what {name}: {error}")
            continue
        # One process prints.
        if not job.out:
            continue
        for part in output:
            if isinstance(part, str):
                shell.tell(part)
            else:
                console.print(part)
        print(flush=True)
    return refused


def tell_files(job: Job) -> None:
    """Tells which files were written."""
    # The manifest of a record is written once for each batch.
    paths = dict.fromkeys(job.written)
    shell.tell("\n".join(["written:", *(f"  {path}" for path in paths)]))


def refuse_wrong_flags(flags: argparse.Namespace) -> None:
    """Raises UserError for a value of a flag that is wrong whatever the run is."""
    unknown = [way for way in flags.ways.split(",") if way not in knockout.WAYS]
    if unknown:
        raise UserError(
            f"--ways: {unknown[0]!r} is not known: choose from {', '.join(knockout.WAYS)}"
        )
    for name in numbers_of(flags):
        for message in not_among("--numbers", name, FFN_NUMBERS):
            raise UserError(message)
    for name in ("batches", "batch_size", "steps", "seed"):
        if getattr(flags, name) < 0:
            raise UserError(f"--{name} {getattr(flags, name)} must be at least 0")
    if flags.steps and flags.frozen:
        raise UserError(
            f"--frozen {flags.frozen} is of replay without training, and --steps {flags.steps} "
            "trains: take one of them"
        )
    if (flags.num_processes, flags.process_id) != (None, None) and not flags.coordinator:
        raise UserError("--num_processes and --process_id need --coordinator HOST:PORT beside them")


def start_devices(flags: argparse.Namespace) -> None:
    """Sets up simulated devices, and joins the other processes."""
    # Before anything else uses jax, whose devices do not change any more after that.
    if flags.simulate_devices:
        mesh.simulate(flags.simulate_devices)
    if flags.coordinator:
        jax.distributed.initialize(flags.coordinator, flags.num_processes, flags.process_id)


def refuse_other(cfg: Config, workdir: Path) -> None:
    """Raises UserError for a run of anything but the language model."""
    if not (TASKS[cfg.task].is_language and MODELS[cfg.model.kind].instruments):
        raise UserError(
            f'--workdir {workdir} is a run of task "{cfg.task}", model.kind "{cfg.model.kind}": '
            'the instruments look into the language model (task "lm", model.kind "decoder") alone'
        )


def fitted(cfg: Config, flags: argparse.Namespace) -> Config:
    """Returns the config of the run on the mesh and with the batch size of the flags."""
    lengths = mesh.parse(flags.mesh, "--mesh")
    if lengths.num_devices > len(jax.devices()):
        raise UserError(
            f"--mesh {flags.mesh} needs more than the {len(jax.devices())} devices there are: "
            "--simulate_devices"
        )
    evaluation = dataclasses.replace(cfg.eval, batch_size=flags.batch_size or cfg.eval.batch_size)
    cfg = dataclasses.replace(cfg, mesh=lengths, eval=evaluation)
    # Another mesh and another size may break rules that the run kept.
    rules.enforce(cfg)
    return cfg


def open_job(cfg: Config, trained: Run, flags: argparse.Namespace) -> Job:
    """Returns what the instruments read. `cfg`: of the run, on the mesh of the flags."""
    data = lm.open_data(cfg)
    run = held_out.open_run(cfg, data, trained.judged, trained.router_state, flags.batches)
    out = flags.workdir / "probe" if jax.process_index() == 0 else None
    if out:
        out.mkdir(exist_ok=True)
        shell.tell(f"step {trained.step} of {flags.workdir}, {held_out_rows(run)} held-out rows")
    return Job(cfg, run, trained, flags, out, [])


def held_out_rows(run: held_out.Run) -> int:
    """Returns the rows of all processes; rows that fill up the last batch are none."""
    # A row of segment 0 alone is padding.
    here = sum(int((batch.segment_BS > 0).any(1).sum()) for batch in run.batches)
    return here * jax.process_count()


def save(job: Job, name: str, figures: Any) -> None:
    """Writes figures as JSON, with their step and the number of held-out rows."""
    if job.out:
        about = {"step": job.trained.step, "rows": held_out_rows(job.run), "mesh": job.flags.mesh}
        path = job.out / f"{name}.json"
        path.write_text(json.dumps({**about, name: figures}, indent=1) + "\n")
        job.written.append(path)


def run_replay(job: Job) -> Output:
    """Measures the held-out loss under other routings, with further training if asked for."""
    if job.flags.steps:
        return run_retrain(job)
    last = job.trained.step
    asked = [int(step) for step in job.flags.frozen.split(",") if step]
    steps = asked or [step for step in job.trained.steps() if step < last]
    later = [step for step in steps if step > last]
    if later:
        raise UserError(
            f"--frozen {later[0]} is later than the checkpoint that is looked at ({last}): "
            "name earlier ones"
        )
    # All in memory at once: each is the way "frozen STEP" of every batch.
    runs = {step: job.trained.at(step) for step in steps}
    earlier = {step: (run.judged, run.router_state) for step, run in runs.items()}
    result = replay.evaluate(job.run, earlier, job.flags.seed)
    save(job, "replay", result)
    return tables.replay(result, "held-out bits per byte under another routing")


def run_retrain(job: Job) -> Output:
    """Trains on under each routing, and measures the held-out loss after it."""
    step = job.trained.step
    # The whole state: a Run has no moments of the optimizer.
    init = jit_initial(job.cfg, make_model(job.cfg.model))
    abstract = jax.eval_shape(init, jax.random.key(0))
    state = checkpoints(job.trained.workdir).restore(step, abstract, stacked=False)
    result = retrain.evaluate(job.run, job.cfg, state, job.flags.steps, job.flags.seed)
    save(job, "retrain", result)
    title = (
        f"held-out bits per byte after {job.flags.steps} steps under another routing, "
        f"from step {step}"
    )
    return tables.replay(result, title)


def run_precision(job: Job) -> Output:
    """Measures which share of the routing decisions hangs on rounding."""
    result = precision.measure(job.run)
    output = tables.precision(result)
    if names := numbers_of(job.flags):
        result["numbers"] = numbers.measure(job.run, names)
        output += tables.of_numbers(result["numbers"])
    save(job, "precision", result)
    return output


def numbers_of(flags: argparse.Namespace) -> list[str]:
    """Returns what --numbers names."""
    return [name for name in flags.numbers.split(",") if name]


def run_knockout(job: Job) -> Output:
    """Measures what each expert is worth in each domain, and draws it."""
    domains = list(job.run.dataset.domains)
    result: dict[str, Any] = {}
    output: Output = []
    for way in job.flags.ways.split(","):
        try:
            worth = knockout.measure(job.run, way, job.flags.seed)
        except UserError as error:
            # Of this router: the other way, and the other instruments, go on.
            result[way] = {"note": str(error)}
            output.append(f"knock-out, {knockout.PASSIVE[way]}: {error}")
            continue
        result[way] = {name: without_nan(getattr(worth, name)) for name in worth._fields}
        output += tables.knockout(worth, domains, way)
        if job.out:
            path = job.out / f"knockout_{way}.png"
            picture.knockout(worth, domains, way, path)
            job.written.append(path)
    save(job, "knockout", {"domains": domains, **result})
    return output


def without_nan(z: np.ndarray) -> list[Any]:
    """Returns an array as lists, with None for NaN, which JSON does not have: a domain without rows
    has such.
    """
    return np.asarray(np.where(np.isnan(z), np.array(None), z)).tolist()


def run_interference(job: Job) -> Output:
    """Measures the batch of the step after the checkpoint, as the training run would take it."""
    cfg, run = job.run.cfg, job.run
    if cfg.model.moe.sparse.stored.block:
        raise UserError(
            "--what interference needs gradients, and experts stored as blocks have none: convert "
            "compact --format dense"
        )
    size = cfg.train.batch_size
    rows = local_rows(size)
    local = Batches(run.dataset, "train", cfg.seed, size).rows(job.trained.step, rows)
    model = make_model(cfg.model)
    # A gradient needs no moments of the optimizer.
    state = State(jnp.int32(job.trained.step), run.params, run.router_state, {}, None, jnp.int32(0))
    result = interference.make_meter(cfg, model)(state, put(local, rows, size))
    save(job, "interference", result)
    return tables.interference(result)


def run_record(job: Job) -> Output:
    """Writes files numbered by held-out batch, in probe/routing."""
    cfg, run = job.run.cfg, job.run
    record_of = held_out.make_record(cfg.model, probe.ROUTING)
    for number, batch in enumerate(run.batches):
        run.tell(f"batch {number + 1} of {len(run.batches)}")
        fields = record_of(run.params, run.router_state, held_out.put_batch(run, batch))
        whole = held_out.whole(batch, cfg.eval.batch_size)
        if job.out:
            arrays = record.compact(fields, whole, cfg.model.moe.num_experts, cfg.eval.batch_size)
            about = record.about(cfg, run.dataset.domains)
            about |= {"checkpoint": job.trained.step, "split": "heldout"}
            record.write_step(job.out / "routing", number, arrays, about)
            files = record.MANIFEST, record.file_name(number)
            job.written.extend(job.out / "routing" / name for name in files)
    rows, files = held_out_rows(run), len(run.batches)
    return [f"the routing of {rows} held-out rows in {files} files, one a batch"]


INSTRUMENTS: dict[str, Callable[[Job], Output]] = {
    "replay": run_replay,
    "precision": run_precision,
    "knockout": run_knockout,
    "interference": run_interference,
    "record": run_record,
}
