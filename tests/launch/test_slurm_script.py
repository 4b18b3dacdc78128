"""What launch/slurm.sbatch checks before it starts anything, with stand-ins for SLURM."""

import subprocess
from pathlib import Path

import program
import pytest

ROOT = Path(__file__).parents[2]
SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames"*) printf 'n0\\nn1\\n' ;;
  *"show node "*) echo "NodeName=${!#} NodeAddr=${!#} NodeHostName=${!#}" ;;
esac
"""
# ADDRESSES is "n0=127.0.1.1 n1=10.0.0.2"; a name that is not there does not resolve.
GETENT = """#!/usr/bin/env bash
for entry in $ADDRESSES; do
  [ "${entry%%=*}" != "$2" ] || { echo "${entry#*=} $2"; exit 0; }
done
exit 2
"""
# Runs the task of one process.
SRUN = """#!/usr/bin/env bash
while [ "$1" != bash ]; do shift; done
exec "$@"
"""
PYTHON = """#!/usr/bin/env bash
echo "$* devices=${JAX_LOCAL_DEVICE_IDS:-all}"
"""
PROGRAMS = {
    "scontrol": SCONTROL,
    "getent": GETENT,
    "srun": SRUN,
    "squeue": "#!/bin/sh\necho RUNNING\n",
    "python": PYTHON,
}
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_NTASKS": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "ADDRESSES": "n0=10.0.0.1 n1=10.0.0.2",
}


@pytest.fixture
def start(tmp_path):
    """Runs the script as the batch shell of a job with some other variables."""
    for name, text in PROGRAMS.items():
        program.write(tmp_path / name, text)

    def start(*flags, **env):
        return subprocess.run(
            ["bash", str(ROOT / "launch/slurm.sbatch"), *flags],
            cwd=tmp_path,
            env=program.first_on_path(tmp_path) | JOB | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return start


def test_the_first_node_is_the_coordinator(start):
    done = start("--workdir=runs/a b")
    assert done.returncode == 0, done.stderr
    wanted = "-m moe_jax.main --coordinator=n0:20112 --num_processes=2 --process_id=1"
    assert done.stdout == f"{wanted} --workdir=runs/a b devices=all\n"
    assert "job 7, start 1: 2 processes, process 0 at n0:20112" in done.stderr
    assert "--coordinator=n0:20113 " in start(SLURM_RESTART_COUNT="1").stdout
    assert "--coordinator=n0:20128 " in start(SLURM_JOB_ID="8").stdout
    named = {"MOE_JAX_COORDINATOR": "ib0", "MOE_JAX_PORT": "29500"}
    addresses = f"{JOB['ADDRESSES']} ib0=10.1.0.1"
    assert "--coordinator=ib0:29500 " in start(**named, ADDRESSES=addresses).stdout


@pytest.mark.parametrize(
    "addresses, words",
    [
        ("n0=10.0.0.1", "node n1 cannot be resolved (n1): give it an entry in DNS or /etc/hosts"),
        (
            "n0=127.0.1.1 n1=10.0.0.2",
            "n0 is 127.0.1.1 on its own machine, where no other node (n1)",
        ),
        ("n0=::1 n1=10.0.0.2", "n0 is ::1 on its own machine"),
    ],
)
def test_names_that_do_not_resolve_are_refused(start, addresses, words):
    done = start(ADDRESSES=addresses)
    assert done.returncode == 64 and words in done.stderr and done.stdout == ""


def test_nodes_of_one_machine_may_all_be_loopback(start):
    assert start(ADDRESSES="n0=127.0.0.1 n1=127.0.0.1").returncode == 0


@pytest.mark.parametrize(
    "tasks, gpus, local, devices",
    [
        ("2(x2)", "0,1", "1", "1"),
        ("2(x2)", "0,1,2,3", "1", "2,3"),
        ("8(x4)", "0,1,2,3,4,5,6,7", "5", "5"),
        ("2(x2)", "1", "1", "all"),  # SLURM gave each task a GPU of its own
        ("1(x2)", "0,1,2,3", "0", "all"),
    ],
)
def test_tasks_of_a_node_share_the_gpus_that_they_see(start, tasks, gpus, local, devices):
    env = {"SLURM_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": gpus, "SLURM_LOCALID": local}
    assert start(**env).stdout.endswith(f" devices={devices}\n")
    assert start(**env, JAX_LOCAL_DEVICE_IDS="9").stdout.endswith(" devices=9\n")
