"""Whole runs: resumed bit for bit, refused when changed, stopped by Ctrl-C or a loss that is not finite, started from another run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import meshes
import models
import numpy as np
import pytest

from moe_jax import train
from moe_jax.checkpoint import Checkpoints, flat
from moe_jax.errors import UserError
from moe_jax.metrics import read_rows
from moe_jax.state import initial, make_model
from moe_jax.stopping import first_broken

ROOT = Path(__file__).parent.parent
SMALL = {
    "model.vocab_size": 256,
    "model.repeats": 1,
    "model.dropout": 0.1,
    "data.sources": (("embedded:verse", 1.0),),
    "data.slice_bytes": 20_000,
    "data.heldout_bytes": 2_000,
    "data.seq_len": 32,
    "train.steps": 10,
    "train.batch_size": 8,
    "optim.warmup_steps": 2,
    "optim.ema_decay": 0.5,
    "eval.every": 0,
    "eval.batches": 1,
    "eval.final_batches": 1,
    "eval.sample_tokens": 0,
    "checkpoint.every": 0,
    "log.every": 1,
    "log.tensorboard": False,
    "mesh.data": 1,
}


def run(workdir, changes=None, shape=(1, 1, 1)):
    axes = {f"mesh.{name}": length for name, length in zip(("data", "expert", "model"), shape, strict=True)}
    raw = models.raw(SMALL | axes | (changes or {}))
    cfg = models.build(shape, SMALL | axes | (changes or {}))
    with jax.set_mesh(meshes.make(*shape)):
        return train.run(cfg, raw, workdir, time.monotonic())


def saved(workdir, changes=None):
    """The newest checkpoint as {name: array}, on one device."""
    cfg = models.build((1, 1, 1), SMALL | (changes or {}))
    with jax.set_mesh(meshes.make(1, 1, 1)):
        abstract = jax.eval_shape(jax.jit(initial(cfg, make_model(cfg.model))), jax.random.key(0))
        saves = Checkpoints(workdir / "checkpoints", every=0, keep=1, keep_best=0)
        state = saves.restore(saves.latest(), abstract, stacked=cfg.model.scan)
        return {name: np.asarray(x) for name, x in flat.unstack(flat.flatten(state), cfg.model.scan).items()}


def losses(workdir):
    rows = [row for row in read_rows(workdir / "metrics.jsonl") if "train/loss" in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row["train/loss"] for row in rows}


@pytest.mark.parametrize("dispatcher", ["dropless", "capacity"])
def test_five_steps_a_restart_and_five_are_ten(float64, tmp_path, dispatcher):
    choice = {"model.moe.dispatcher": dispatcher}
    run(tmp_path / "straight", choice)
    run(tmp_path / "halves", choice | {"train.stop_at": 5})
    result = run(tmp_path / "halves", choice)
    assert result.step == 10
    want, got = saved(tmp_path / "straight", choice), saved(tmp_path / "halves", choice)
    assert want.keys() == got.keys() and "params/ends/embed" in want and any(name.startswith("ema/") for name in want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert losses(tmp_path / "halves") == losses(tmp_path / "straight")


def test_goes_on_on_another_mesh_and_with_scan_refused(float64, tmp_path):
    run(tmp_path / "straight")
    run(tmp_path / "moved", {"train.stop_at": 5}, shape=(2, 2, 2))
    run(tmp_path / "moved", {"eval.every": 3, "checkpoint.every": 4})
    one, other = losses(tmp_path / "straight"), losses(tmp_path / "moved")
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-10
    with pytest.raises(UserError) as error:
        run(tmp_path / "moved", {"optim.learning_rate": 5e-3, "model.dropout": 0.0})
    for text in ("optim.learning_rate", "0.003", "0.005", "model.dropout"):
        assert text in str(error.value)


def test_starts_from_another_run(float64, tmp_path, capsys):
    run(tmp_path / "first")
    changes = {
        "train.init_from": str(tmp_path / "first"),
        "train.steps": 2,
        "model.moe.expert_hidden": 24,
        "model.moe.shared_experts": 1,
    }
    run(tmp_path / "second", changes)
    text = capsys.readouterr().out
    assert "loaded   ends/embed" in text
    assert (
        "left     repeats/0/blocks/0/moe/experts/w_in" in text
        and "left     repeats/0/blocks/0/dense/weights/w_in" in text
    )


def config_file(folder, **changes):
    """A config like the tests' above, for a process of its own."""
    path = folder / "tiny.py"
    flat_changes = {**models.TINY, **SMALL, "model.param_dtype": "float32", "model.dtype": "float32", **changes}
    path.write_text(
        "from configs import base\n\n\ndef get_config(arg=None):\n    c = base.get_config(arg)\n"
        f"    with c.unlocked():\n        c.update_from_flattened_dict({flat_changes!r})\n    return c\n"
    )
    (folder / "base.py").write_text((ROOT / "configs/base.py").read_text())
    return path


def command(config, workdir, *flags):
    return [sys.executable, "-u", "-m", "moe_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_place(tmp_path):
    config = config_file(
        tmp_path, **{"optim.learning_rate": 1e37, "optim.clip_norm": 0.0, "train.nonfinite_patience": 2}
    )
    done = subprocess.run(command(config, tmp_path / "run"), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 76, done.stderr
    assert "not finite 3 time(s) in a row (train.nonfinite_patience = 2)" in done.stderr
    assert re.search(r"the gradient of (ends|repeats)/\S+ went wrong first; no checkpoint yet", done.stderr)


def test_what_went_wrong_first_is_nearest_to_the_loss():
    names = [
        "ends/embed",
        "ends/head",
        "ends/norm_scale",
        "repeats/0/blocks/0/moe/experts/w_out",
        "repeats/1/blocks/0/attention/weights/q",
    ]
    assert first_broken(names, np.array([0, 1, 1, 0, 0])) == "repeats/1/blocks/0/attention/weights/q"
    assert first_broken(names, np.array([0, 0, 0, 0, 0])) == "ends/head"
    assert first_broken(names, np.ones(5)) == "none: the loss itself"


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    config = config_file(tmp_path, **{"train.steps": 100_000, "optim.warmup_steps": 2})
    start = command(config, tmp_path / "run")
    process = subprocess.Popen(start, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    step = int(text.split("saved step ")[1].split(" ")[0])
    assert step >= 2 and "go on with:\n  python -m moe_jax.main" in text
    again = subprocess.run(
        [*start, f"--config.train.stop_at={step + 2}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0 and f"going on from step {step}" in again.stdout
    assert f"{step + 2} of 100000" in again.stdout


def test_two_processes_do_what_one_does(tmp_path):
    """launch/local.sh 2 4 with configs/debug.py: two real processes of four devices, the same losses as one process of eight."""
    flags = [
        "--config",
        "configs/debug.py",
        "--config.train.steps=4",
        "--config.eval.every=0",
        "--config.eval.sample_tokens=0",
        "--config.model.repeats=1",
        "--config.model.prefix=()",
    ]
    env = os.environ | {"PYTHON": sys.executable}
    for name, start in (("one", [sys.executable, "-m", "moe_jax.main"]), ("two", ["launch/local.sh", "2", "4"])):
        command = [*start, *flags, f"--workdir={tmp_path}/{name}"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        for name in ("train/loss", "eval/loss", "train/grad_norm", "moe/load_max"):
            if name in a:
                assert abs(a[name] - b[name]) < 2e-5 * max(1, abs(a[name])), (a["step"], name)
    assert json.loads((tmp_path / "two/run.json").read_text())[0]["processes"] == 2
