"""Programs that are compiled for a chip that is not there, each in a process of its own."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _has_cuda():
    names = [f"jax_plugins.xla_cuda{version}" for version in (12, 13)]
    has_any = importlib.util.find_spec("jax_plugins") is not None
    return has_any and any(importlib.util.find_spec(name) for name in names)


needs_cuda = pytest.mark.skipif(not _has_cuda(), reason="the extra [cuda] is not installed")


def told_by(program, *args):
    """Returns what a program prints as JSON in its last line."""
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
