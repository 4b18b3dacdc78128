"""Signals are heard at once and lose nothing, wherever in a run they come; output that goes away
ends no run.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_cases
from suites import normal

from moe_jax import checkpoint, evaluate, train
from moe_jax.decoding import sample
from moe_jax.errors import UserError
from moe_jax.instruments import picture
from moe_jax.report.metrics import read_rows
from moe_jax.runtime import shell, signals
from moe_jax.tasks import contract

ROOT = Path(__file__).parents[2]
BEGIN = """
import hashlib, os, sys, time
from moe_jax.runtime import shell, signals
heard = signals.LISTENER
"""
# a minute in which no handler in Python runs
IN_COMPILED_CODE = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 60_000_000)'


def start(program, *arguments, **options):
    """A process that has printed "ready"."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + program, *arguments], cwd=ROOT, text=True, **pipes
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_without_anything_to_save_a_signal_ends_the_process_at_once(number):
    process = start(f'heard.start(); print("ready", flush=True); {IN_COMPILED_CODE}')
    process.send_signal(number)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number
    assert errors.startswith(f"{number.name}: interrupted; what was saved stays")


def test_a_signal_is_told_at_once_and_a_second_ends_the_process():
    process = start(f'heard.start(); heard.note(); print("ready", flush=True); {IN_COMPILED_CODE}')
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: heard, the run saves and ends")
    process.send_signal(signal.SIGTERM)  # the same request once more, as `timeout` sends it
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2 * signals.SAME_REQUEST)
    process.send_signal(signal.SIGINT)
    assert "SIGINT again: ended at once" in process.communicate(timeout=20)[1]
    assert process.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)]
)
def test_after_a_run_that_is_saved_a_signal_ends_the_process_at_once(number, code):
    """While its baselines are measured and its tables made."""
    process = start(
        'heard.start(); heard.note(); heard.release(); heard.saved = True; print("ready", '
        f"flush=True); {IN_COMPILED_CODE}"
    )
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code


def test_a_signal_that_is_ignored_stays_ignored():
    """As nohup asks for."""
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); heard.start()\n"
    process = start(program + 'print("ready", flush=True); time.sleep(1); print("end")')
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0] == "end\n" and process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_clears_away_what_it_has_begun(number):
    program = """
def main(argv):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleared")
sys.exit(shell.run_command(main, []))
"""
    process = start(program)
    process.send_signal(number)
    text, errors = process.communicate(timeout=20)
    assert text == "cleared\n" and process.returncode == 128 + number and "Traceback" not in errors


def interrupting(function, number=signal.SIGTERM):
    """The function, which sends a signal to its own process before it does anything, and waits
    until it is heard.
    """

    def called(*args, **kwargs):
        os.kill(os.getpid(), number)
        while signals.LISTENER.number != number:
            time.sleep(0.01)
        return function(*args, **kwargs)

    return called


PLACES = {
    "a step": (train, "log_row"),
    "a batch of an evaluation": (evaluate, "put"),
    "the predictions": (contract, "write_predictions"),
    "a sample": (sample, "_row_state"),
    "the pictures": (picture, "routing"),
    "the last save": (checkpoint.Checkpoints, "close"),
}


NORMAL = ("a step", "a batch of an evaluation", "the last save")


@pytest.mark.parametrize("place", normal(NORMAL, PLACES))
def test_a_run_is_saved_wherever_a_signal_comes(float64, tmp_path, monkeypatch, capfd, place):
    changes = {
        "train.steps": 3,
        "eval.batch_size": 1,
        "eval.final_batches": 0,
        "eval.sample_tokens": 40,
    }
    changes |= {"data.heldout_bytes": 400}
    owner, name = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupting(getattr(owner, name)))
        result = run_cases.run(tmp_path, changes)
    step = 2 if place == "a step" else 3
    assert result.signal == signal.SIGTERM and result.step == step
    assert (tmp_path / f"checkpoints/step_0000000{step}/moe_jax.json").exists()
    assert "SIGTERM: heard, the run saves and ends" in capfd.readouterr().err
    assert run_cases.run(tmp_path, changes).signal == 0
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval/loss" in row] == [3]


def test_who_listened_before_a_run_listens_after_it():
    before = signal.getsignal(signal.SIGTERM)
    with signals.listening() as heard:
        assert signal.getsignal(signal.SIGTERM) != before and heard.started
        with signals.listening() as inner:
            assert inner is heard
        assert heard.started
    assert signal.getsignal(signal.SIGTERM) == before and not signals.LISTENER.started


FAKE_PYTHON = """#!/bin/bash
[ "$1" = -c ] && { echo 1; exit; }
for word in "$@"; do case $word in --process_id=*) rank=${word#*=};; esac; done
for name in INT TERM HUP; do trap "echo $name >> $FOLDER/$rank; sleep 0.5; exit $rank" $name; done
echo "rank $rank"
touch $FOLDER/$rank
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("name", ["INT", "TERM", "HUP"])
def test_the_launcher_passes_a_signal_on_once_and_waits(tmp_path, name):
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    log = tmp_path / "run.log"
    log.write_text("of the first start\n")
    environment = {**os.environ, "PYTHON": str(tmp_path / "python"), "FOLDER": str(tmp_path)}
    with log.open("a") as output:
        command = ["launch/local.sh", "3", "1", "--config", "x", "--workdir", "y"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, start_new_session=True
        )
    while not all((tmp_path / str(rank)).exists() for rank in range(3)):
        time.sleep(0.02)
    time.sleep(0.1)
    os.killpg(process.pid, getattr(signal, f"SIG{name}"))  # as a terminal does
    assert process.wait(20) in (1, 2)  # that of a process, which has ended
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f"{name}\n"] * 3
    assert log.read_text() == "of the first start\nrank 0\n"


SPEAKER = """
shell.open_output(lasting=True)
print("ready")
sys.stdin.readline()
for number in range(3):
    print("a word", number, "\\N{BOX DRAWINGS HEAVY HORIZONTAL}")
print("the end", file=sys.stderr)
"""


def test_a_closed_pipe_ends_no_run():
    process = start(SPEAKER, stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    with process.stderr as errors:
        assert errors.read() == "standard output is gone (Broken pipe): going on without\nthe end\n"
    assert process.wait(20) == 0


def test_a_full_disk_or_a_closed_descriptor_under_the_output_ends_no_run(tmp_path):
    (tmp_path / "speaker.py").write_text(BEGIN + SPEAKER)
    command = f"PYTHONPATH=. exec {sys.executable} {tmp_path}/speaker.py </dev/null"
    for redirected in (">/dev/full", ">&-", ">&- 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {redirected}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("lasting", [False, True])
def test_what_an_encoding_lacks_is_escaped(lasting):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    program = f'{BEGIN}shell.open_output(lasting={lasting}); print("\\N{{MULTIPLICATION SIGN}}")'
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("\\xd7\n", "")


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        ("BrokenPipeError(32, 'Broken pipe')", 128 + signal.SIGPIPE, ""),
        (
            "OSError(28, 'No space left on device', 'probe/replay.json')",
            64,
            "error: probe/replay.json: No space left",
        ),
    ],
)
def test_a_command_whose_output_cannot_be_written_ends_with_a_line(raised, code, told):
    program = f"{BEGIN}\ndef main(argv):\n    raise {raised}\nsys.exit(shell.run_command(main, []))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (
        done.returncode == code and done.stderr.startswith(told) and "Traceback" not in done.stderr
    )


def test_the_command_to_go_on_with_stops_nowhere(monkeypatch):
    monkeypatch.delenv("MOE_JAX_COMMAND", raising=False)
    for flags in (["--config.train.stop_at=5"], ["--config.train.stop_at", "5"], []):
        monkeypatch.setattr(sys, "argv", ["main.py", *flags, "--workdir", "a b"])
        assert re.search(
            r"-m moe_jax.main --workdir 'a b' --config.train.stop_at=0$", shell.going_on(5, 5)
        )
        assert shell.going_on(4, 5) == shell.own_command()
    monkeypatch.setenv(
        "MOE_JAX_COMMAND", "launch/local.sh 2 4 --config.train.stop_at=5 --workdir w "
    )
    assert shell.going_on(5, 5) == "launch/local.sh 2 4 --workdir w --config.train.stop_at=0"


def test_a_workdir_that_is_deleted_is_noticed(tmp_path):
    workdir = tmp_path / "run"
    with shell.held(workdir, "--workdir") as held:
        held.check()
        workdir.rename(tmp_path / "elsewhere")
        with pytest.raises(
            UserError, match=r"--workdir .*run was deleted or moved while it was in use"
        ):
            held.check()
        with (
            shell.held(workdir, "--workdir") as other,
            pytest.raises(UserError, match="was deleted or moved"),
        ):
            other.check()
            held.check()
