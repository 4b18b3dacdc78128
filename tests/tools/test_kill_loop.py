"""A run that is killed at random times ends as one that nobody killed (tools/kill_loop.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.full  # three minutes
def test_twenty_kills_change_no_bit():
    words = [sys.executable, "tools/kill_loop.py", "--kills", "20"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("20 times SIGKILL to 1 process(es)"), last
