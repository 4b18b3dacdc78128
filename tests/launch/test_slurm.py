"""launch/slurm.sbatch as SLURM runs it, on two nodes that are started for these tests.

One job trains for real. The others have a program in the place of Python that ends as it is told,
for what is tried there is what the script makes of exit codes and signals.
"""

import os
import shlex
import subprocess

import program
import pytest
import slurm_cluster

from moe_jax.parallel.compiling import QUICK, as_flags
from moe_jax.report.metrics import read_rows

SCRIPT = "launch/slurm.sbatch"
FLAGS = """
--config=configs/debug.py --config.mesh.model=1 --config.model.repeats=1 --config.model.prefix=()
--config.train.steps=80 --config.train.micro_batch_size=0 --config.eval.every=0
--config.eval.sample_tokens=0 --config.eval.final_batches=1 --config.checkpoint.every=0
--config.log.every=1 --config.log.histogram_every=1000 --config.log.tensorboard=False
""".split()
FAST = f"{os.environ.get('XLA_FLAGS', '')} {as_flags(QUICK)}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = program.missing("slurmctld", "slurmctld", "slurmd", "slurm-client")
    if missing:
        pytest.skip(missing)
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


STAND_IN = """#!/usr/bin/env bash
start=${SLURM_RESTART_COUNT:-0}
echo "$*" >"$STAND_IN.$start.$SLURM_PROCID.${SLURM_ARRAY_TASK_ID:-}"
eval "$PLAN"
"""


@pytest.fixture(scope="module")
def submit(cluster):
    """Submits a job whose processes are lines of bash; `start` and `SLURM_PROCID` say which."""
    python = program.write(cluster.root / "python", STAND_IN)

    def submit(name, plan, *words, **env):
        stand_in = {"PYTHON": str(python), "STAND_IN": str(cluster.root / name), "PLAN": plan}
        return cluster.submit(name, *(words or [SCRIPT]), env=stand_in | env)

    return submit


# Saves when it is told to, and is done after the second start.
SAVES = "[ $start = 0 ] || exit 0; trap 'exit 0' TERM; while true; do sleep 0.2; done"


@pytest.fixture(scope="module")
def limited(submit):
    """A job whose time is up soon. SLURM looks every 30 s, so it waits beside other tests."""
    return submit("limited", SAVES, "--time=1", "--signal=B:TERM@30", SCRIPT)


# A run that trains


def curve(workdir):
    """{step: (loss, norm of the gradient)} as hexadecimal numbers. No step is there twice."""
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "train/loss" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {r["step"]: (r["train/loss"].hex(), r["train/grad_norm"].hex()) for r in rows}


def last_step(workdir):
    path = workdir / "metrics.jsonl"
    return max([0, *(row["step"] for row in read_rows(path))]) if path.exists() else 0


def by_its_script(cluster, job):
    """Ends a job as before the end of its time, after which its own script has it requeued."""
    # As the test of `limited` hears it from SLURM.
    cluster.say("scancel", "--batch", "--signal=TERM", job)
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1")


def by_slurm(cluster, job):
    cluster.say("scontrol", "requeue", job)
    cluster.until(lambda: cluster.job(job)["JobState"] == "PENDING")


def interrupted(cluster, workdir, ways):
    """Submits the run and interrupts it. Returns the job, and the last step before each stop."""
    flags = [*FLAGS, "--config.simulate_devices=1", f"--workdir={workdir}"]
    job = cluster.submit("trains", SCRIPT, *flags, env={"XLA_FLAGS": FAST})
    stops = []
    for way in ways:
        begun = stops[-1] if stops else 0
        cluster.until(lambda begun=begun: last_step(workdir) >= begun + 5)
        way(cluster, job)
        stops.append(last_step(workdir))
    return job, stops


@pytest.mark.parametrize(
    "ways",
    [
        pytest.param([by_slurm], id="by SLURM"),
        pytest.param([by_its_script, by_slurm], id="by both", marks=pytest.mark.full),
    ],
)
def test_a_job_that_is_requeued_computes_what_an_uninterrupted_run_computes(
    cluster, limited, tmp_path, ways
):
    one, two = tmp_path / "uninterrupted", tmp_path / "requeued"
    # Each process has one device.
    command = ["launch/local.sh", "2", "1", *FLAGS, f"--workdir={one}"]
    env = cluster.env | {"XLA_FLAGS": FAST}
    alone = subprocess.Popen(
        command, cwd=slurm_cluster.ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        job, stops = interrupted(cluster, two, ways)
        _, errors = alone.communicate(timeout=slurm_cluster.PATIENCE)
    finally:
        alone.terminate()
    assert alone.returncode == 0, errors
    fields = cluster.wait(job)
    ended = fields["JobState"], fields["Restarts"]
    assert ended == ("COMPLETED", str(len(ways))), cluster.told()
    assert stops[0] >= 5 and stops == sorted(set(stops)) and stops[-1] < 80
    assert curve(one) == curve(two)
    said = (cluster.logs / f"{job}.0.log").read_text()
    assert said.count("saved step") == len(ways) and f"saved step {stops[-1]} of 80" in said
    assert f"go on with:\n  sbatch {SCRIPT} --config=configs/debug.py" in said


# What becomes of exit codes and signals


def ended(cluster, job):
    fields = cluster.wait(job)
    return fields["JobState"], fields["ExitCode"], fields["Restarts"]


def test_some_exit_codes_end_the_job(cluster, submit):
    """That of the process that failed first, though SLURM ends the other one by a signal."""
    codes = (64, 70, 76, 77, 78)
    plan = "[ $SLURM_PROCID = 1 ] && exit {}; sleep 60"
    jobs = {code: submit(f"fails_{code}", plan.format(code)) for code in codes}
    for code, job in jobs.items():
        assert ended(cluster, job) == ("FAILED", f"{code}:0", "0"), cluster.told()


def test_a_process_that_was_lost_starts_the_job_again(cluster, submit):
    killed = "[ $start$SLURM_PROCID = 01 ] && kill -KILL $$; [ $start = 0 ] && sleep 60; exit 0"
    job = submit("killed", killed, SCRIPT, "--workdir=runs/a b", "--config.seed=%a")
    retried = submit("retried", "exit 75", MOE_JAX_MAX_RESTARTS="1")
    assert ended(cluster, job) == ("COMPLETED", "0:0", "1"), cluster.told()
    ports = set()
    for start in (0, 1):
        for process in (0, 1):
            text = (cluster.root / f"killed.{start}.{process}.").read_text()
            module, coordinator, *rest = shlex.split(text)[1:]
            assert module == "moe_jax.main"
            host, _, port = coordinator.removeprefix("--coordinator=").rpartition(":")
            assert host == "127.0.0.1" and 20000 <= int(port) < 32000
            ports.add(port)
            # Without an array, %a is nothing special.
            assert rest[:2] == ["--num_processes=2", f"--process_id={process}"]
            assert text.rstrip().endswith("--workdir=runs/a b --config.seed=%a")
    assert len(ports) == 2
    assert ended(cluster, retried) == ("FAILED", "75:0", "1"), cluster.told()
    assert "not started again: it was 1 times" in (cluster.root / "retried.out").read_text()


def test_exit_code_0_after_sigterm_is_no_finished_run(cluster, submit):
    """The processes alone have heard it, as from a preemption with a time of grace."""
    job = submit("preempted", SAVES)
    cluster.until(lambda: (cluster.root / "preempted.0.1.").exists())
    cluster.say("scancel", "--signal=TERM", job)
    assert ended(cluster, job) == ("COMPLETED", "0:0", "1"), cluster.told()
    assert "exit code 0, after SIGTERM" in (cluster.root / "preempted.out").read_text()


def test_a_job_that_is_cancelled_stays_cancelled(cluster, submit):
    job = submit("cancelled", SAVES)
    cluster.until(lambda: (cluster.root / "cancelled.0.1.").exists())
    cluster.say("scancel", job)
    state, _, restarts = ended(cluster, job)
    assert (state, restarts) == ("CANCELLED", "0"), cluster.told()


def test_a_job_saves_before_its_time_is_up(cluster, limited):
    assert ended(cluster, limited) == ("COMPLETED", "0:0", "1"), cluster.told()
    assert "SIGTERM: the run saves and ends" in (cluster.root / "limited.out").read_text()


def test_tasks_of_an_array_have_their_number_in_the_flags(cluster, submit):
    flags = [SCRIPT, "--workdir=runs/seed_%a", "--config.seed=%a"]
    job = submit("array", "exit 0", "--array=3,5", *flags)
    for number in ("3", "5"):
        assert ended(cluster, f"{job}_{number}")[0] == "COMPLETED", cluster.told()
        text = (cluster.root / f"array.0.1.{number}").read_text()
        assert text.rstrip().endswith(f"--workdir=runs/seed_{number} --config.seed={number}")
        assert (cluster.logs / f"{job}_{number}.1.log").exists()
