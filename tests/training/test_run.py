"""Whole runs: resumed bit for bit, refused when changed, stopped by Ctrl-C or a loss that is not
finite, started from another run.
"""

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import meshes
import numpy as np
import pytest
import tiny
from run_cases import SMALL, losses, run
from suites import normal

from moe_jax import train
from moe_jax.checkpoint import Checkpoints, flat
from moe_jax.commands import generate
from moe_jax.errors import UserError
from moe_jax.parallel.compiling import QUICK, as_flags
from moe_jax.report.metrics import read_rows
from moe_jax.run import load_run
from moe_jax.runtime import shell
from moe_jax.runtime.stopping import first_broken
from moe_jax.train_step import initial, make_model

ROOT = Path(__file__).parents[2]


# Subprocesses: compiled in half the time, and one device needs no more threads than cores.
FAST = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
FAST |= {
    "PYTHON": sys.executable,
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {as_flags(QUICK)}",
}


def saved(workdir, changes=None):
    """The newest checkpoint as {name: array}, on one device."""
    cfg = tiny.build((1, 1, 1), SMALL | (changes or {}))
    with jax.set_mesh(meshes.make(1, 1, 1)):
        abstract = jax.eval_shape(jax.jit(initial(cfg, make_model(cfg.model))), jax.random.key(0))
        saves = Checkpoints(workdir / "checkpoints", every=0, keep=1, keep_best=0)
        state = saves.restore(saves.latest(), abstract, stacked=cfg.model.scan)
        return {
            name: np.asarray(x)
            for name, x in flat.unstack(flat.flatten(state), cfg.model.scan).items()
        }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten dropless steps in float64 on one device, steps 3 and 4 with a profile."""
    jax.config.update("jax_enable_x64", True)
    folder = tmp_path_factory.mktemp("straight")
    run(folder, {"profile": "3:5"})
    jax.config.update("jax_enable_x64", False)
    return folder


def forget(workdir, key):
    """Makes the newest checkpoint one that was saved before `key` was thought of."""
    path = max((workdir / "checkpoints").glob("step_*")) / "moe_jax.json"
    manifest = json.loads(path.read_text())
    block, _, name = key.rpartition(".")
    del manifest["metadata"]["config"][block][name]
    del manifest["sha256"]  # which such manifests did not have
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("dispatcher", normal(["dropless"], ["dropless", "capacity"]))
def test_five_steps_a_restart_and_five_are_ten(float64, tmp_path, straight, capsys, dispatcher):
    choice = {"model.moe.dispatcher": dispatcher}
    if dispatcher != "dropless":
        # The window of the last losses is a part of the state, too.
        choice["train.spike_sigma"] = 6.0
        straight = tmp_path / "straight"
        run(straight, choice)
    run(tmp_path / "halves", choice | {"train.stop_at": 5})
    forget(tmp_path / "halves", "optim.clip_norm")
    result = run(tmp_path / "halves", choice)
    assert (
        "optim.clip_norm is new since this run: taken as its default 1.0" in capsys.readouterr().out
    )
    assert result.step == 10
    want, got = saved(straight, choice), saved(tmp_path / "halves", choice)
    assert (
        want.keys() == got.keys()
        and "params/ends/embed" in want
        and any(name.startswith("ema/") for name in want)
    )
    assert ("spikes/value_2W" in want) == (dispatcher != "dropless")
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert losses(tmp_path / "halves") == losses(straight)


def test_a_profile_names_the_phases(straight):
    (path,) = straight.glob("profile/plugins/profile/*/phases.json")
    found = json.loads(path.read_text())
    assert found["steps"] == 2
    times = {(row["phase"], row["pass"]): row["ms"] for row in found["phases"]}
    for phase in ("moe/route", "moe/dispatch", "moe/experts", "moe/combine", "attention"):
        assert times[phase, "forward"] > 0 and times[phase, "backward"] > 0, times
    assert times["optimizer", ""] > 0
    text = path.with_suffix(".txt").read_text()
    assert all(phase in text for phase, _ in times)
    with gzip.open(next(path.parent.glob("*.trace.json.gz")), "rt") as file:
        events = [
            event for event in json.load(file)["traceEvents"] if "scope" in event.get("args", {})
        ]
    assert any(
        e["name"].startswith("moe/experts backward | ")
        and "transpose(jvp(" in e["args"]["scope"]
        and "/moe/experts" in e["args"]["scope"]
        for e in events
    )


def test_goes_on_on_another_mesh_and_with_scan_refused(float64, tmp_path, straight):
    run(tmp_path / "moved", {"train.stop_at": 5}, shape=(2, 2, 2))
    run(tmp_path / "moved", {"eval.every": 3, "checkpoint.every": 4})
    one, other = losses(straight), losses(tmp_path / "moved")
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-10
    with pytest.raises(UserError) as error:
        run(tmp_path / "moved", {"optim.learning_rate": 5e-3, "model.dropout": 0.0})
    for text in ("optim.learning_rate", "0.003", "0.005", "model.dropout"):
        assert text in str(error.value)
    forget(tmp_path / "moved", "optim.learning_rate")  # and today it is not its default:
    with pytest.raises(UserError, match=r"optim.learning_rate was 0.003, is 0.005"):
        run(tmp_path / "moved", {"optim.learning_rate": 5e-3})


def test_starts_from_another_run(float64, tmp_path, straight, capsys):
    changes = {
        "train.init_from": str(straight),
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


@pytest.mark.parametrize(("router", "name"), [("sigmoid", "bias"), ("random", "salt")])
def test_the_state_of_the_routers_comes_along(float64, tmp_path, router, name):
    """Without training: a checkpoint of a state by hand, and what a run would begin with.

    Of another router it is left.
    """

    def begun(router, saves, value, source=""):
        cfg = tiny.build(changes=SMALL | {"model.moe.router": router, "train.init_from": source})
        abstract = jax.eval_shape(jax.jit(initial(cfg, make_model(cfg.model))), jax.random.key(0))
        filled = jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), abstract)
        return train.begin(cfg, saves, {}, lambda key: filled, abstract)

    with jax.set_mesh(meshes.make(1, 1, 1)):
        saves, new = (
            Checkpoints(tmp_path / f / "checkpoints", every=1, keep=1, keep_best=0)
            for f in ("old", "new")
        )
        saves.save(3, begun(router, saves, 0.25)[0], metadata={}, score=None, stacked=False)
        saves.close()
        state, notes = begun(router, new, 0.0, str(tmp_path / "old"))
        assert all(
            (np.asarray(z) == 0.25).all()
            for z in jax.tree.leaves((state.params, state.router_state))
        )
        assert f"  loaded   repeats/0/blocks/0/moe/state/{name}" in notes
        state, notes = begun("relu", new, 0.0, str(tmp_path / "old"))
        assert all((np.asarray(z) == 0).all() for z in jax.tree.leaves(state.router_state))
        missing = "repeats/0/blocks/0/moe/state/l1"
        assert f"  left     {missing}: {missing} is not in the checkpoint" in notes


def config_file(folder, **changes):
    """A config like the tests' above, for a process of its own."""
    path = folder / "tiny.py"
    flat_changes = {
        **tiny.TINY,
        **SMALL,
        "model.param_dtype": "float32",
        "model.dtype": "float32",
        **changes,
    }
    path.write_text(
        "from configs import base\n\n\ndef get_config(arg=None):\n    c = base.get_config(arg)\n"
        f"    with c.unlocked():\n        c.update_from_flattened_dict({flat_changes!r})\n    "
        "return c\n"
    )
    (folder / "base.py").write_text((ROOT / "configs/base.py").read_text())
    return path


def command(config, workdir, *flags):
    return [
        sys.executable,
        "-u",
        "-m",
        "moe_jax.main",
        f"--config={config}",
        f"--workdir={workdir}",
        *flags,
    ]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_place(tmp_path):
    config = config_file(
        tmp_path,
        **{"optim.learning_rate": 1e37, "optim.clip_norm": 0.0, "train.nonfinite_patience": 2},
    )
    done = subprocess.run(
        command(config, tmp_path / "run"),
        cwd=ROOT,
        env=FAST,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 76, done.stderr
    assert "not finite 3 time(s) in a row (train.nonfinite_patience = 2)" in done.stderr
    assert re.search(
        r"the gradient of (ends|repeats)/\S+ went wrong first; no checkpoint yet", done.stderr
    )
    dump = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert dump["parameters_with_a_gradient_that_is_not_finite"] and dump["step"] > 1


def test_what_went_wrong_first_is_nearest_to_the_loss():
    names = [
        "ends/embed",
        "ends/head",
        "ends/norm_scale",
        "repeats/0/blocks/0/moe/experts/w_out",
        "repeats/1/blocks/0/attention/weights/q",
    ]
    assert (
        first_broken(names, np.array([0, 1, 1, 0, 0])) == "repeats/1/blocks/0/attention/weights/q"
    )
    assert first_broken(names, np.array([0, 0, 0, 0, 0])) == "ends/head"
    assert first_broken(names, np.ones(5)) == "none: the loss itself"


def test_one_process_at_a_time_writes_to_a_workdir(tmp_path):
    with (
        shell.held(tmp_path / "run", "--workdir"),
        pytest.raises(UserError, match=r"--workdir .*run is in use by another process"),
        shell.held(tmp_path / "run", "--workdir"),
    ):
        pass
    with shell.held(tmp_path / "run", "--workdir"):
        (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--workdir .*file cannot be made or written to"),
        shell.held(tmp_path / "file", "--workdir"),
    ):
        pass


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    config = config_file(tmp_path, **{"train.steps": 100_000, "optim.warmup_steps": 2})
    start = command(config, tmp_path / "run")
    process = subprocess.Popen(start, cwd=ROOT, env=FAST, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signal.SIGINT)
            break
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    step = int(text.split("saved step ")[1].split(" ")[0])
    assert step >= 2 and shlex.join(start[2:]) in text.split("go on with:")[1]
    options = {"cwd": ROOT, "env": FAST, "capture_output": True, "text": True, "timeout": 300}
    again = subprocess.run(
        [*start, "--config.train.steps=99000", f"--config.train.stop_at={step + 2}"], **options
    )
    assert again.returncode == 0 and f"going on from step {step}" in again.stdout
    assert (
        f"{step + 2} of 99000" in again.stdout
        and "train.steps = 100000 so far, 99000 from here on" in again.stdout
    )
    fewer = subprocess.run([*start, "--config.train.steps=2"], **options)
    assert (
        fewer.returncode == 64
        and f"ends before the newest checkpoint of this run (step {step + 2})" in fewer.stderr
    )


# configs/debug.py, a little smaller.
FLAGS = (
    "--config=configs/debug.py",
    "--config.model.repeats=1",
    "--config.model.prefix=()",
    "--config.train.steps=4",
    "--config.log.every=1",
    "--config.eval.every=0",
    "--config.eval.sample_tokens=0",
    "--config.log.tensorboard=False",
)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """A folder with the run of one process of eight devices and of two of four
    (launch/local.sh).
    """
    folder = tmp_path_factory.mktemp("processes")
    for name, start in (
        ("one", [sys.executable, "-m", "moe_jax.main"]),
        ("two", ["launch/local.sh", "2", "4"]),
    ):
        line = [*start, *FLAGS, "--config.profile=2:3", f"--workdir={folder}/{name}"]
        done = subprocess.run(line, cwd=ROOT, env=FAST, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_do_what_one_does(processes):
    """Two real processes of four devices, the same losses as one process of eight."""
    rows = [read_rows(processes / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        for name in ("train/loss", "eval/loss", "train/grad_norm", "moe/load_max"):
            if name in a:
                assert abs(a[name] - b[name]) < 2e-5 * max(1, abs(a[name])), (a["step"], name)
    assert json.loads((processes / "two/run.json").read_text())[0]["processes"] == 2
    assert (
        len(list((processes / "two/profile").glob("process_[01]/plugins/profile/*/phases.json")))
        == 2
    )


@pytest.mark.full
def test_a_run_moves_to_two_processes_and_back(processes):
    """The data go on where they were, whoever reads them."""
    one, two = [sys.executable, "-m", "moe_jax.main"], ["launch/local.sh", "2", "4"]
    for start, stop_at in ((one, 1), (two, 3), (one, 0)):
        words = [
            *start,
            *FLAGS,
            f"--workdir={processes}/moved",
            f"--config.train.stop_at={stop_at}",
        ]
        done = subprocess.run(
            words, cwd=ROOT, env=FAST, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr
    want, got = (losses(processes / name) for name in ("one", "moved"))
    assert want.keys() == got.keys()
    assert max(abs(want[step] - got[step]) for step in want) < 2e-6


def test_a_run_of_two_processes_can_be_generated_from(processes, capsys):
    """By one process, as always: generate makes a mesh of one device, whatever wrote the
    checkpoint.
    """
    loaded = []
    for name in ("one", "two"):
        params = load_run(processes / name).parameters
        loaded.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]))
    assert abs(loaded[0] - loaded[1]).mean() < 1e-6 < abs(loaded[0]).mean()
    assert (
        generate.main(
            ["--workdir", str(processes / "two"), "--prompt", "To be", "--max_tokens", "4"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert text.startswith("To be") and len(text) > len("To be\n")
