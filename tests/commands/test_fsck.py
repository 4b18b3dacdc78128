"""`fsck`: what is damaged is told, repaired where asked, and nothing whole is lost."""

import json
import shutil

import pytest
import run_cases

from moe_jax.commands import fsck

STEPS = (4, 8)
FLOAT32 = {"model.dtype": "float32", "model.param_dtype": "float32"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with two checkpoints."""
    workdir = tmp_path_factory.mktemp("fsck") / "run"
    run_cases.run(workdir, FLOAT32 | {"train.steps": STEPS[1], "checkpoint.every": STEPS[0]})
    return workdir


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def step_path(run, step):
    return run / "checkpoints" / f"step_{step:08d}"


def damage(run, step):
    flip(
        max(
            (p for p in step_path(run, step).rglob("*") if p.is_file()),
            key=lambda p: p.stat().st_size,
        )
    )


def test_a_whole_run_is_well(run, capsys):
    assert fsck.work([str(run)]) == 0
    said = capsys.readouterr().out
    assert "whole checkpoints: 4, 8" in said and "all is well" in said


def test_a_damaged_checkpoint_is_told_and_set_aside(run, capsys):
    damage(run, 8)
    before = sorted(path.name for path in run.rglob("*"))
    assert fsck.work([str(run)]) == 1
    assert (
        "has changed since it was written; with --repair it is renamed" in capsys.readouterr().out
    )
    assert sorted(path.name for path in run.rglob("*")) == before
    assert fsck.work([str(run), "--repair"]) == 0
    assert (run / "checkpoints/step_00000008.damaged0").is_dir() and step_path(run, 4).is_dir()
    assert fsck.work([str(run)]) == 0


def test_when_none_is_whole_nothing_is_renamed(run):
    for step in STEPS:
        damage(run, step)
    assert fsck.work([str(run), "--repair"]) == 77
    assert all(step_path(run, step).is_dir() for step in STEPS)


def test_ruins_and_torn_rows_are_cleared_away(run, capsys):
    metrics = run / "metrics.jsonl"
    rows = metrics.read_bytes()
    metrics.write_bytes(rows + b'{"step": 9, "train/lo')
    ruin = step_path(run, 12)
    ruin.mkdir()
    ruin.with_name(ruin.name + ".unfinished").touch()
    (run / "summary.json").write_text("{")
    assert fsck.work([str(run)]) == 1
    said = capsys.readouterr().out
    assert "its last row is torn" in said and "half-written" in said and "summary.json" in said
    assert fsck.work([str(run), "--repair"]) == 0
    assert metrics.read_bytes() == rows and not ruin.exists()
    assert json.loads(rows.splitlines()[-1])["step"] == 8
