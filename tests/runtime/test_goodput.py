"""Goodput: every second belongs to one activity, and steps that are made again do not count."""

import json

import pytest

from moe_jax.runtime import goodput
from moe_jax.runtime.goodput import REDONE, STEPS, Goodput


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def started(workdir, step, clock):
    counted = Goodput(goodput.time.monotonic())
    counted.open(workdir, step)
    clock(2.0)
    counted.phase(STEPS)
    return counted


def test_every_second_belongs_to_the_innermost_activity(tmp_path, clock):
    counted = started(tmp_path, 0, clock)
    clock(3.0)
    with counted.doing("evaluating"):
        clock(1.0)
        with counted.doing("saving"):
            clock(0.5)
        clock(0.25)
    clock(3.0)
    assert counted.seconds(10) == {"start": 2.0, STEPS: 6.0, "evaluating": 1.25, "saving": 0.5}
    assert counted.share(10) == pytest.approx(6.0 / 9.75)


def test_steps_after_the_checkpoint_of_a_restart_are_redone(tmp_path, clock):
    """Killed at step 10, started again from step 6: 4 of 10 steps are made again."""
    counted = started(tmp_path, 0, clock)
    clock(10.0)
    counted.write(10)
    counted = started(tmp_path, 6, clock)
    clock(8.0)
    assert counted.seconds(14) == {"start": 4.0, STEPS: 14.0, REDONE: 4.0}
    assert counted.text(14) == (f"64% of the time in steps over 2 starts, {REDONE} 18%, start 18%")
    # A third start goes back behind the second one, to a step of the first.
    counted.write(14)
    counted = started(tmp_path, 5, clock)
    assert counted.seconds(5) == {"start": 6.0, STEPS: 5.0, REDONE: 13.0}


def test_a_run_that_begins_anew_or_a_file_that_was_emptied_count_from_zero(tmp_path, clock):
    counted = started(tmp_path, 0, clock)
    counted.write(10)
    assert len(json.loads((tmp_path / goodput.FILE).read_text())["starts"]) == 1
    assert started(tmp_path, 0, clock).seconds(0) == {"start": 2.0}
    (tmp_path / goodput.FILE).write_text("")
    assert started(tmp_path, 3, clock).seconds(3) == {"start": 2.0}
