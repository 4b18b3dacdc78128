"""The watchdog: what is slow trips nothing, what is stuck ends, each by its own limit."""

import os
import subprocess
import sys
import threading
import time

import pytest
from suites import normal

from moe_jax.runtime.watchdog import Watchdog

SCRIPT = """
import sys, time
from pathlib import Path
from moe_jax.runtime import signals
from moe_jax.runtime.watchdog import WATCHDOG

signals.LISTENER.start()
signals.LISTENER.note()
WATCHDOG.start(step=1.0, other=4.0, grace=0.5, stacks=Path(sys.argv[1]))
WATCHDOG.step_done()
{body}
WATCHDOG.stop()
print("ended by itself")
"""
STEPS = "for _ in range(12): time.sleep(0.2); WATCHDOG.step_done()"
SLOW = "with WATCHDOG.slow('saving'): time.sleep(2.5)"
STUCK = "time.sleep(60)"
STUCK_SLOW = "with WATCHDOG.slow('saving'): time.sleep(60)"
TOLD = "import os; os.kill(os.getpid(), 15)\n"


def run(body, stacks):
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body), str(stacks)],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - begun


@pytest.mark.parametrize(
    "body", normal([STEPS, TOLD + SLOW], [STEPS, SLOW, TOLD + STEPS, TOLD + SLOW])
)
def test_what_moves_or_is_known_to_be_slow_goes_on(body, tmp_path):
    code, said, _ = run(body, tmp_path / "stacks.txt")
    assert code == 0 and "ended by itself" in said
    assert not (tmp_path / "stacks.txt").exists()


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        (STUCK, 75, "no step has been done for 1 s (limits.step = 1)"),
        (STUCK_SLOW, 75, "saving has taken 4 s (limits.other = 4)"),
        (TOLD + STUCK, 143, "told to end, and nothing has moved"),
    ],
)
def test_what_is_stuck_ends_with_the_stacks_of_its_threads(body, code, words, tmp_path):
    found, said, _ = run(body, tmp_path / "stacks.txt")
    assert found == code and words in said
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "Current thread" in stacks and '<string>", line' in stacks


def test_a_run_that_ends_takes_its_thread_along(tmp_path):
    before = threading.active_count()
    watchdog = Watchdog()
    for _ in range(5):
        watchdog.start(step=0, other=0, grace=0, stacks=tmp_path / "stacks.txt")
        watchdog.stop()
    time.sleep(0.6)
    assert threading.active_count() == before
