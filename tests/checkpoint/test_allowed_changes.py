"""`--allow_change`: a run goes on with another value of a key that is named, and only of that."""

import json
import time

import jax
import meshes
import pytest
import run_cases
import tiny

from moe_jax import checkpoint, train
from moe_jax.errors import UserError

OLD = {"optim": {"learning_rate": 0.1, "clip_norm": 1.0}, "seed": 0}


def changed(**optim):
    return {**OLD, "optim": {**OLD["optim"], **optim}}


def test_every_changed_key_below_a_name_is_told():
    notes = checkpoint.allowed_changes(OLD, changed(learning_rate=0.2), ("optim",))
    assert notes == ["optim.learning_rate was 0.1, is 0.2 from here on (--allow_change)"]


def test_a_repeated_command_is_no_mistake():
    notes = checkpoint.allowed_changes(OLD, OLD, ("optim.learning_rate",))
    assert notes == [
        "--allow_change=optim.learning_rate: nothing of it differs from what was saved"
    ]


def test_a_name_that_is_no_key_is_refused():
    with pytest.raises(UserError, match="no such key"):
        checkpoint.allowed_changes(OLD, OLD, ("optim.rate",))


def test_a_run_goes_on_with_it_and_is_then_one_with_it(tmp_path):
    def run(steps, rate, allowed=()):
        changes = run_cases.SMALL | {"train.steps": steps, "optim.learning_rate": rate}
        changes |= {"model.dtype": "float32", "model.param_dtype": "float32"}
        changes |= {f"mesh.{axis}": 1 for axis in ("data", "expert", "model")}
        cfg, raw = tiny.build((1, 1, 1), changes), tiny.raw(changes)
        with jax.set_mesh(meshes.make(1, 1, 1)):
            return train.run(cfg, raw, tmp_path, time.monotonic(), "tiny", allowed)

    run(4, 0.01)
    with pytest.raises(UserError, match=r"learning_rate was 0.01, is 0.02.*--allow_change=KEY"):
        run(6, 0.02)
    assert run(6, 0.02, ("optim.learning_rate",)).step == 6
    assert run(8, 0.02).step == 8
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 9))
