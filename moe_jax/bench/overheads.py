"""What a run spends beside its steps: waiting for data, logging, saving, and its guards.

Each row is a real run, with one of them switched on. The time is that of the run from its first
step to its last, without the start, compilation and evaluation; it is read from what the run itself
notes (goodput.json).

All rows are runs of one process, in turn. Of two processes that run the same steps one may be 15 %
slower for as long as it lives, by where its memory lies: much more than what is looked for here.
"""

import itertools
import json
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
from moe_jax.parallel import mesh
from moe_jax.runtime import goodput

STEPS = 100
# Steps between two checkpoints of the run that saves: ten times as often as by default. Every run
# saves at its end.
SAVES = 50
NEVER = 10**6
BARE = "nothing but steps"
WAITING = "waiting for data"
# What a run does between its first step and its last, by the names that its goodput has.
IN_THE_LOOP = (goodput.STEPS, WAITING, "saving", "finishing the last save")
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
    each; every further run is that of the next row.

    The first run of each row is not timed: it compiles. What the first row waited for data is a
    fact.
    """
    read(job)
    rows = job.options["rows"]
    first, *_ = [spent(job.config, changes) for changes in rows]
    turns = itertools.cycle(rows)

    def timed() -> float:
        seconds = spent(job.config, next(turns))
        return sum(seconds.get(activity, 0.0) for activity in IN_THE_LOOP)

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
