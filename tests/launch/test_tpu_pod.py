"""launch/tpu_pod.sh with a stand-in for gcloud, which notes what it was called with.

Its flags are those of gcloud 528; no TPU was there to try them on.
"""

import os
import shlex
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import program
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/tpu_pod.sh"
# CODES are the exit codes of one start after another, STATES those of the queued resource.
GCLOUD = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$NOTES/calls"
echo >>"$NOTES/calls"
next() {
  local line
  line=$(head -n 1 "$NOTES/$1")
  [ "$(wc -l <"$NOTES/$1")" -le 1 ] || sed -i 1d "$NOTES/$1"
  echo "$line"
}
case "$*" in
  *describe*) next states ;;
  *scp*) cp "$5" "$NOTES/code.tar.gz" ;;
  # The run has ended before this has returned.
  *pkill*) touch "$NOTES/stopped" && sleep 0.5 ;;
  *moe_jax.main*)
    [ -e "$NOTES/codes" ] && exit "$(next codes)"
    touch "$NOTES/started"
    while [ ! -e "$NOTES/stopped" ]; do sleep 0.1; done
    ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """Calls the script; returns (exit code, standard error, calls of gcloud)."""
    program.write(tmp_path / "gcloud", GCLOUD)
    env = program.first_on_path(tmp_path) | {"NOTES": str(tmp_path), "MOE_JAX_POLL": "0"}

    def call(command, *words, codes=(), states=("ACTIVE",), **more):
        for name, lines in (("codes", codes), ("states", states)):
            if lines:
                (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        line = [SCRIPT, command, "pod", "us-central1-a", *words]
        done = subprocess.run(line, env=env | more, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr, calls(tmp_path)

    call.env = env
    return call


def calls(folder):
    path = folder / "calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


QUEUED = ["compute", "tpus", "queued-resources"]
SSH = ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-central1-a", "--worker=all"]


def test_a_slice_is_asked_for_and_waited_for(pod):
    states = ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    code, said, made = pod("create", "v5litepod-16", "v2-alpha-tpuv5-lite", "--spot", states=states)
    assert code == 0 and "pod is PROVISIONING" in said
    wanted = [*QUEUED, "create", "pod", "--node-id=pod", "--zone=us-central1-a"]
    wanted += ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert made[0] == wanted
    describe = [*QUEUED, "describe", "pod", "--zone=us-central1-a", "--format=value(state.state)"]
    assert made[1:] == [describe] * 3


def test_a_slice_that_cannot_be_had_is_told(pod):
    assert pod("create", "v4-16", "tpu-ubuntu2204-base", states=("FAILED",))[0] == 75


def test_the_code_goes_to_all_machines(pod, tmp_path):
    code, said, (copy, unpack) = pod("install")
    assert code == 0, said
    assert copy[:4] == ["compute", "tpus", "tpu-vm", "scp"]
    assert copy[5:] == ["pod:moe_jax.tar.gz", "--zone=us-central1-a", "--worker=all"]
    with tarfile.open(tmp_path / "code.tar.gz") as archive:
        assert {"requirements.txt", "moe_jax/main.py", "configs/base.py"} <= {*archive.getnames()}
    assert unpack[:-1] == SSH and "-r requirements/tpu.txt" in unpack[-1]
    assert subprocess.run(["bash", "-n"], input=unpack[-1][len("--command=") :], text=True)


def test_a_run_starts_on_all_machines_and_again_after_75(pod):
    flags = ["--config=configs/base.py", "--config.data.folder=a b"]
    code, said, made = pod("run", *flags, codes=(75, 137, 0))
    assert code == 0 and len(made) == 3, said
    line = made[0][-1]
    assert made[0][:-1] == SSH and line.startswith("--command=cd moe_jax && exec .venv/bin/python")
    words = shlex.split(line.partition("exec ")[2])
    assert words == [".venv/bin/python", "-m", "moe_jax.main", "--distributed", *flags]


@pytest.mark.parametrize("codes, starts", [((64,), 1), ((75,), 3), ((78,), 1), ((143,), 1)])
def test_how_often_a_run_starts(pod, codes, starts):
    code, _, made = pod("run", "--workdir=w", codes=codes, MOE_JAX_MAX_RESTARTS="2")
    assert (code, len(made)) == (codes[0], starts)


def test_a_lost_connection_starts_no_second_run(pod):
    code, said, made = pod("run", "--workdir=w", codes=(255,))
    assert code == 75 and len(made) == 1 and "the run may go on there" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_on_all_machines(pod, tmp_path, number):
    line = [SCRIPT, "run", "pod", "us-central1-a", "--workdir=w"]
    run = subprocess.Popen(line, env=pod.env, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "started").exists():
        assert run.poll() is None
        time.sleep(0.1)
    os.kill(run.pid, number)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0 and "the run saves and ends" in said
    assert calls(tmp_path)[-1] == [*SSH, "--command=pkill -TERM -f '[m]oe_jax.main'"]


def test_wrong_words_are_answered_with_the_usage(pod):
    code, said, made = pod("begin")
    assert code == 64 and "launch/tpu_pod.sh create NAME ZONE TYPE VERSION" in said and not made
