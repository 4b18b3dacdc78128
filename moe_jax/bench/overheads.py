"""What a run spends beside its steps: waiting for data, logging, saving, and its guards.

Each row is a real run, with one of them switched on. Of two runs of the same steps one may be 15 %
slower, by where its memory lies: much more than what is looked for here. So the length of a run is
not compared. What is taken is how long the loop waits for something else than a step, as the run
itself notes it (goodput.json), and the processor time of all threads that compute no steps, as
Linux counts it, spread over the cores. Runs of one row agree in that within a few tenths of a
second.

All rows are runs of one process, in turn: tracing and the like are in all of them, and what a row
has more than the first is its cost.
"""

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from moe_jax import config, train
from moe_jax.bench import results, workers
from moe_jax.bench.contract import Job, Prepared
from moe_jax.bench.ours import read
from moe_jax.bench.session import Part, Session
from moe_jax.config import command_line
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.runtime import goodput

STEPS = 60
# Steps between two checkpoints of the run that saves: more often than anybody would. Every run
# saves at its end.
SAVES = 30
NEVER = 10**6
BARE = "nothing but steps"
WAITING = "waiting for data"
# What the loop waits for beside its steps, by the names that the goodput of a run has.
WAITS = (WAITING, "saving", "finishing the last save")
# The threads of XLA that compute steps, by the beginning of their names.
OF_STEPS = "tf_XLA"
# Where Linux has a folder for each thread of this process.
THREADS = Path("/proc/self/task")
LOGGING = ("--config.log.every=10",)
SAVING = (f"--config.checkpoint.every={SAVES}",)
# The thread that watches whether steps are made.
WATCHING = ("--config.limits.step=600", "--config.limits.other=7200")
# The old moments outlive the new ones, so that a step can be left out.
SKIPPING = ("--config.train.nonfinite_patience=3", "--config.train.spike_sigma=6")
# What is switched on in a row.
ROWS = {
    BARE: (),
    "logging": LOGGING,
    "saving": SAVING,
    "the watchdog": WATCHING,
    "steps that can be left out": SKIPPING,
    "all but that": (*LOGGING, *SAVING, *WATCHING),
}
OFF = (
    f"--config.train.steps={STEPS}",
    f"--config.log.every={NEVER}",
    f"--config.log.histogram_every={NEVER}",
    "--config.checkpoint.every=0",
    "--config.limits.step=0",
    "--config.limits.other=0",
    "--config.eval.every=0",
    "--config.eval.final_batches=1",
    "--config.eval.sample_tokens=0",
)


def overheads(session: Session) -> Part:
    """Times runs of the last variant, each with one more thing switched on."""
    if not THREADS.exists():
        raise UserError("--what overheads needs the processor times of threads, as Linux has them")
    job, _ = list(session.variants.values())[-1]
    rows = {name: [*job.changes, *OFF, *switched_on] for name, switched_on in ROWS.items()}
    runs = job._replace(kind="run", options={"rows": list(rows.values())})
    # A round of the one process is one run, and a round of the table is a run of each row.
    timing = workers.interleave([runs], session.rounds * len(rows), session.tell)[job.name]
    timings = {
        name: timing._replace(seconds=timing.seconds[number :: len(rows)])
        for number, name in enumerate(rows)
    }
    return {"overheads": timings}, [results.overheads(timings, STEPS, job.name)]


def run(job: Job) -> Prepared:
    """Prepares runs of a config, each in a workdir of its own. Option: rows, the changed keys of
    each; every further run is that of the next row. What is timed is what a run spends beside its
    steps.

    The first run of each row is not timed: it compiles. What the first row waited for data is a
    fact.
    """
    read(job)
    rows = job.options["rows"]
    first, *_ = [spent(job.config, changes) for changes in rows]
    turns = itertools.cycle(rows)

    def timed() -> float:
        before = processor_seconds()
        seconds = spent(job.config, next(turns))
        of_threads = processor_seconds() - before
        waits = sum(seconds.get(activity, 0.0) for activity in WAITS)
        return waits + of_threads / len(os.sched_getaffinity(0))

    waited = first.get(WAITING, 0.0)
    facts = {"waited": waited, "stepped": first[goodput.STEPS]}
    return Prepared(facts, timed)


def spent(config_name: str, changes: Sequence[str]) -> dict[str, float]:
    """Makes a run, and returns the seconds of each of its activities."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        raw = command_line.read(Path(config_name), list(changes))
        cfg = config.build(raw, len(jax.devices()))
        with jax.set_mesh(mesh.make(cfg.mesh, slow_axis=cfg.mesh_slow_axis)):
            train.run(cfg, raw, workdir, time.monotonic())
        (start,) = json.loads((workdir / goodput.FILE).read_text())["starts"]
    return start["seconds"]


def processor_seconds() -> float:
    """Returns the processor time of this process so far, but for the threads that compute steps."""
    of_process = os.times()
    ticks = 0
    for thread in THREADS.iterdir():
        # A thread that has ended is none of XLA's.
        with contextlib.suppress(OSError):
            # "7 (name) S ...": user and system time are the 14th and 15th word, in ticks.
            name, _, words = (thread / "stat").read_text().partition(" (")[2].rpartition(") ")
            if name.startswith(OF_STEPS):
                ticks += sum(map(int, words.split()[11:13]))
    return of_process.user + of_process.system - ticks / os.sysconf("SC_CLK_TCK")
