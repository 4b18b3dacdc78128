"""`mpirun ... --distributed` for real, with Open MPI."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import program
import pytest

from moe_jax.parallel.compiling import QUICK, as_flags
from moe_jax.report.metrics import read_rows

ROOT = Path(__file__).parents[2]
# As root, mpirun wants to be told twice that this is meant.
ENV = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MPIRUN = ["mpirun", "--oversubscribe", "-np", "2"]
FLAGS = """
--config=configs/debug.py --config.mesh.model=1 --config.model.repeats=1 --config.model.prefix=()
--config.train.steps=2 --config.train.micro_batch_size=0 --config.eval.every=0
--config.eval.sample_tokens=0 --config.eval.final_batches=1 --config.log.every=1
--config.log.tensorboard=False --config.simulate_devices=1
""".split()


@pytest.fixture(scope="module", autouse=True)
def mpirun():
    missing = program.missing("mpirun", "openmpi-bin")
    if missing:
        pytest.skip(missing)


@pytest.mark.full
def test_jax_finds_the_processes_of_mpirun(tmp_path):
    command = [*MPIRUN, sys.executable, "-m", "moe_jax.main", "--distributed", *FLAGS]
    env = ENV | {"XLA_FLAGS": f"{ENV.get('XLA_FLAGS', '')} {as_flags(QUICK)}"}
    env.pop("PJRT_NPROC", None)
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/run"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())[0]["processes"] == 2
    assert [r["step"] for r in read_rows(tmp_path / "run/metrics.jsonl") if "train/loss" in r] == [
        1,
        2,
    ]


@pytest.mark.parametrize("code", [64, 75, 137])
def test_mpirun_ends_with_the_code_of_the_process_that_failed(code):
    fails = "kill -KILL $$" if code == 137 else f"exit {code}"
    plan = f"[ $OMPI_COMM_WORLD_RANK = 1 ] && {{ {fails}; }}; sleep 60"
    done = subprocess.run([*MPIRUN, "bash", "-c", plan], env=ENV, capture_output=True, timeout=120)
    assert done.returncode == code


def test_the_time_that_mpirun_leaves_to_save(tmp_path):
    """SIGCONT at once, SIGTERM after odls_base_sigkill_timeout, SIGKILL after it has passed again:
    docs/clusters.md says so.
    """
    # Saves for 2 s, which is more than the second that mpirun leaves by default.
    plan = f"trap 'sleep 2; touch {tmp_path}/saved.$OMPI_COMM_WORLD_RANK; exit 0' TERM;"
    plan += f"touch {tmp_path}/started.$OMPI_COMM_WORLD_RANK; while true; do sleep 0.1; done"
    patience = ["--mca", "odls_base_sigkill_timeout", "5"]
    run = subprocess.Popen([*MPIRUN, *patience, "bash", "-c", plan], env=ENV)
    while len(list(tmp_path.glob("started.*"))) < 2:
        assert run.poll() is None
        time.sleep(0.1)
    sent = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) == 1  # whatever its processes end with
    assert time.monotonic() - sent >= 5
    assert {path.name for path in tmp_path.glob("saved.*")} == {"saved.0", "saved.1"}
