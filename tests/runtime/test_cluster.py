"""Two processes of one run: what they compare, and how both end when one of them fails.

The faults are real (config.faults): a killed, a stopped, a hanging process, an exception. The
times are those of the machine's clock, with some slack for a busy one.
"""

import fcntl
import subprocess
import sys

import jax
import pair
import pytest

from moe_jax import errors
from moe_jax.report.metrics import read_rows
from moe_jax.runtime import agreement, cluster, faults

HEARTBEAT, STEP = 4, 6  # seconds, as in pair.SMALL
SLACK = 3  # seconds beside them, on an idle machine about one
FULL = pytest.mark.full  # a run of two processes takes some ten seconds


def test_another_config_in_one_process_is_refused_by_both(tmp_path):
    ends = pair.run(tmp_path, of_each=((), ("--config.seed=3",)))
    assert [end.code for end in ends] == [78, 78]
    for end in ends:
        assert "seed = 0 in process 0, 3 in process 1" in end.last


def test_a_workdir_that_is_in_use_ends_both_with_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ends = pair.run(tmp_path)
    assert [end.code for end in ends] == [64, 64]
    assert all("is in use by another process" in end.last for end in ends)


@pytest.mark.parametrize(
    ("fault", "codes", "limit", "words"),
    [
        ("kill@5:1", (75, -9), HEARTBEAT, "process 1 has not been heard from"),
        pytest.param(*("kill@5:0", (-9, 75), 0, "process 0, the coordinator, is gone"), marks=FULL),
        pytest.param(
            *("raise@5:1", (70, 70), HEARTBEAT, "Injected: config.faults: raise@5:1"), marks=FULL
        ),
        ("hang@5:1", (75, 75), STEP, "no step has been done for"),
    ],
)
def test_a_fault_in_one_process_ends_both(fault, codes, limit, words, tmp_path):
    ends = pair.run(tmp_path, f"--config.faults={fault}")
    assert tuple(end.code for end in ends) == codes, [end.log for end in ends]
    for end in ends:
        assert end.after < limit + SLACK, end
        assert end.code == -9 or words in end.last, end.log
    if fault.startswith("hang"):
        # Of both: whichever speaks first, the other one may be the one that is to blame.
        stacks = [(tmp_path / f"run/stacks/process_{number}.txt").read_text() for number in (0, 1)]
        assert all("Thread" in stack for stack in stacks), stacks
        assert "faults.py" in stacks[1]


TWO_THREADS_END = """
import threading, time, types
from moe_jax.runtime import cluster

peers = cluster.PEERS
peers._client = types.SimpleNamespace(key_value_set=lambda *_, **__: None)
{first}
time.sleep(0.3)
print("step 4: finishing the last save")
peers.end(70, "an echo of it", "the echo")
"""


@pytest.mark.parametrize(
    "first",
    [
        "threading.Thread(target=peers.end, args=(75, 'a hang', 'the reason: a hang')).start()",
        "message = {'process': 1, 'code': 75, 'reason': 'a hang', 'is_stuck': False}\n"
        "threading.Thread(target=peers._obey, args=(message,)).start()",
    ],
)
def test_the_reason_is_the_last_line_whatever_the_main_thread_prints(first):
    program = TWO_THREADS_END.format(first=first)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pair.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 75, done.stdout
    assert done.stdout.splitlines()[-1].endswith(": a hang"), done.stdout


TOLD = """
import sys
from pathlib import Path
from moe_jax.runtime import cluster, stacks

stacks.STACKS.keep_in(Path(sys.argv[1]))
cluster.PEERS._obey({{"process": 1, "code": 75, "reason": "words", "is_stuck": {is_stuck}}})
"""


@pytest.mark.parametrize("is_stuck", [True, False])
def test_a_process_that_is_told_of_a_hang_keeps_its_stacks(is_stuck, tmp_path):
    file = tmp_path / "stacks/process_0.txt"
    program = TOLD.format(is_stuck=is_stuck)
    assert subprocess.run([sys.executable, "-c", program, file], cwd=pair.ROOT).returncode == 75
    assert file.exists() == is_stuck
    if is_stuck:
        assert "process 1: words" in file.read_text() and "_obey" in file.read_text()


PEER_IS_GONE = """
import os, sys, time
import jax, numpy as np
from jax.experimental import multihost_utils
from moe_jax.runtime import cluster

address, number = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(address, 2, number)
multihost_utils.process_allgather(np.int32(1))
if number == 1:
    os._exit(0)
# Until the end of process 1 is known here.
time.sleep(1.0)
try:
    multihost_utils.process_allgather(np.int32(1))
except Exception as error:
    print(type(error).__name__, cluster.may_be_echo(error), flush=True)
os._exit(0)
"""


def test_a_call_when_the_peer_is_gone_is_an_echo():
    """The error is then another one than that of a result that is read."""
    words = [sys.executable, "-c", PEER_IS_GONE, f"127.0.0.1:{pair.free_port()}"]
    second = subprocess.Popen([*words, "1"], cwd=pair.ROOT, stderr=subprocess.DEVNULL)
    first = subprocess.run([*words, "0"], cwd=pair.ROOT, capture_output=True, text=True)
    second.wait()
    assert first.stdout.splitlines()[-1].endswith("Error True"), first


@pytest.mark.parametrize(
    ("error", "may_be"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (ValueError("DEADLINE_EXCEEDED: a barrier"), True),
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Read error"), True),
        (ValueError("a shape that does not fit: (2, 3)"), False),
        (faults.Injected("config.faults: raise@5:1"), False),
    ],
)
def test_an_error_of_the_runtime_may_be_an_echo(error, may_be):
    assert cluster.may_be_echo(error) == may_be


@pytest.mark.full
@pytest.mark.parametrize("number", [0, 1])
def test_a_stopped_process_is_given_up(number, tmp_path):
    ends = pair.run(tmp_path, f"--config.faults=stop@5:{number}", stopped=(number,))
    other = ends[1 - number]
    assert other.code == 75 and other.after < HEARTBEAT + SLACK, other
    assert f"process {number}" in other.last


@pytest.mark.parametrize("number", [pytest.param(0, marks=FULL), 1])
def test_sigterm_to_one_process_saves_the_same_step_in_both(number, tmp_path):
    ends = pair.run(tmp_path, f"--config.faults=term@5:{number}")
    assert [end.code for end in ends] == [0, 0], [end.log for end in ends]
    # On an idle machine 2 s.
    assert all(end.after < 5 * SLACK for end in ends), ends
    assert "saved step 5 of 12" in ends[0].log
    # The same command goes on, and does not meet the fault again.
    ends = pair.run(tmp_path, f"--config.faults=term@5:{number}")
    assert [end.code for end in ends] == [0, 0], [end.log for end in ends]
    steps = [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")]
    assert steps[-1] == 12


def test_preflight_of_two_processes(tmp_path):
    ends = pair.run(tmp_path, "--preflight")
    assert [end.code for end in ends] == [0, 0], [end.log for end in ends]
    assert "nothing was found that would stop this run" in ends[0].log
    assert "all-to-all" in ends[0].log and "WRONG" not in ends[0].log


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("", ()),
        ("kill@5:1", (faults.Fault("kill", 5, 1),)),
        ("raise@3, stop@7:0", (faults.Fault("raise", 3, None), faults.Fault("stop", 7, 0))),
    ],
)
def test_faults_are_parsed(text, parsed):
    assert faults.parse(text, "faults") == parsed


@pytest.mark.parametrize("text", ["kill", "kill@x", "burn@5", "kill@5:1:2"])
def test_what_is_no_fault_is_refused(text):
    with pytest.raises(errors.UserError, match="is no fault"):
        faults.parse(text, "faults")


def test_a_fault_happens_once_in_a_workdir(tmp_path):
    for times in (1, 0):
        injector = faults.Injector(faults.parse("raise@2", "faults"), tmp_path, 0)
        injector.before(1)
        if times:
            with pytest.raises(faults.Injected):
                injector.before(2)
        else:
            injector.before(2)


def test_one_process_compares_nothing():
    agreement.compare("config", {"a": 1}, 1.0)
    assert agreement.gather("config", {"a": 1}, 1.0) == [{"a": 1}]


def test_a_silence_is_that_of_a_process_that_is_not_done():
    before = {"0": "7", "1": "7", "2": cluster.DONE}
    assert not cluster.somebody_silent(before, {"0": "8", "1": "9", "2": cluster.DONE})
    # One that is done between two looks, too.
    assert not cluster.somebody_silent(before, {"0": "8", "1": cluster.DONE, "2": cluster.DONE})
    assert cluster.somebody_silent(before, {"0": "8", "1": "7", "2": cluster.DONE})
    # Process 0 does not answer.
    assert cluster.somebody_silent(before, None) and cluster.somebody_silent(None, before)
