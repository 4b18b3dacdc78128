"""`--smoke`: a few steps of any config exercise the whole run, it says what it changed, and nothing
goes on from it.
"""

import json
import time

import jax
import meshes
import numpy as np
import pytest
import tiny
from task_files import all_train

from moe_jax import config, train
from moe_jax.config import advice, config_file, smoke
from moe_jax.errors import UserError
from moe_jax.report.metrics import read_rows
from moe_jax.tasks.vision import data as vision

TINY = {
    "model.vocab_size": 256,
    "model.repeats": 1,
    "data.sources": (("embedded:verse,novel", 1.0),),
    "data.seq_len": 32,
    "train.steps": 1000,
    "train.batch_size": 4,
    "train.stop_at": 500,
    "optim.warmup_steps": 100,
    "eval.every": 200,
    "eval.sample_tokens": 100,
    "record.steps": "100,every 50",
    "mesh.data": 1,
    "model.param_dtype": "float32",
    "model.dtype": "float32",
}


def begin(workdir, raw):
    cfg = config.build(raw, 1)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        return cfg, train.run(cfg, raw, workdir, time.monotonic())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A smoke run of a long one in which everything is switched on."""
    workdir = tmp_path_factory.mktemp("smoke")
    raw, changed = smoke.shorten(tiny.raw(TINY))
    return workdir, changed, *begin(workdir, raw)


def test_everything_of_a_run_happens_within_a_few_steps(run):
    workdir, changed, cfg, result = run
    assert result.step == cfg.train.steps == smoke.STEPS and cfg.smoke and len(result.sample) > 0
    rows = read_rows(workdir / "metrics.jsonl")
    assert sorted({row["step"] for row in rows if "eval/loss" in row}) == [2, 3]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
    assert list((workdir / "checkpoints").glob("step_*3")) and list((workdir / "routing").iterdir())
    assert (workdir / "predictions.jsonl").stat().st_size and "train.steps 1000 -> 3" in changed


def test_what_comes_every_so_many_steps_comes_within_the_few():
    changes = {
        "profile": "10:13",
        "log.interference_every": 100,
        "record.steps": "50",
        "train.stop_at": 7,
    }
    raw, changed = smoke.shorten(tiny.raw(changes | {"model.moe.sparse.rule": "rigl"}))
    assert (
        raw["profile"] == "2:3"
        and raw["record"]["steps"] == "3"
        and raw["log"]["interference_every"] == 1
    )
    assert (
        raw["model"]["moe"]["sparse"]["rules"]["rigl"]["every"] == 1
        and raw["train"]["stop_at"] == 0
    )
    assert "profile '10:13' -> '2:3'" in changed


def test_what_is_off_stays_off_and_a_shorter_run_stays_shorter():
    raw, changed = smoke.shorten(
        tiny.raw({"train.steps": 1, "eval.every": 0, "eval.sample_tokens": 0})
    )
    assert raw["train"]["steps"] == 1 and raw["eval"]["every"] == raw["eval"]["sample_tokens"] == 0
    assert not (raw["profile"] or raw["record"]["steps"] or raw["log"]["interference_every"])
    assert not any(line.startswith(("train.steps", "profile", "record")) for line in changed)


def test_a_batch_is_there_whatever_its_size():
    raw, _ = smoke.shorten(
        tiny.raw({"data.sources": (("embedded:verse", 1.0),), "train.batch_size": 512})
    )
    assert raw["data"]["slice_bytes"] >= 512 * raw["data"]["seq_len"]


def test_nothing_goes_on_from_a_smoke_run_and_none_goes_on_from_a_run(run, tmp_path):
    workdir = run[0]
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=r"holds a smoke run .* remove the directory, or take another --workdir"
    ):
        begin(workdir, tiny.raw(TINY))
    assert (workdir / "metrics.jsonl").read_bytes() == before
    real = {"smoke": False, "train": {"steps": 3}}
    with pytest.raises(UserError, match=r"holds a run that is no smoke run"):
        smoke.refuse_other(real, {**real, "smoke": True})
    smoke.refuse_other(
        {"train": {"steps": 3}}, real
    )  # a run that was saved before the key was thought of


def test_the_warm_up_fits_into_a_run_that_is_shorter(run):
    (said,) = (line for line in advice.notes(run[2]) if "warmup" in line)
    assert said == "optim.warmup_steps = 100 does not fit into train.steps = 3: the warm-up takes 1"


def test_fewer_examples_are_spread_over_all_and_keep_what_is_known_of_them():
    options = {
        "seq_len": 16,
        "patch": 2,
        "heldout_every": 5,
        "copies": 1,
        "shift": 0,
        "flip": False,
        "seed": 0,
    }
    data = vision.open_vision("digits", "", **options)
    few = data.fewer(50, 7)
    assert few.rows == {"train": 50, "heldout": 7} and len(few.heldout_order()[1]) == 7
    values, labels = few.about.raw["heldout"]
    assert len(values) == len(labels) == 7 and len(few.about.raw["train"][1]) == 50
    rows, whole = all_train(few), all_train(data)
    np.testing.assert_array_equal(rows.label_B, few.about.raw["train"][1])
    np.testing.assert_array_equal(rows.values_BSP[[0, -1]], whole.values_BSP[[0, -1]])
    assert len(set(rows.label_B)) == 10
    assert data.fewer(10**9, 10**9).rows == data.rows


@pytest.mark.parametrize(
    "name", ["debug.py", "vision.py", "speech.py", "article.py", "bench.py", "base.py"]
)
def test_the_config_of_a_smoke_run_is_one_that_the_rules_allow(name):
    raw = config_file.read(config_file.Path("configs") / name)
    short, _ = smoke.shorten(raw)
    cfg = config.build(short, raw["simulate_devices"] or 1)
    assert cfg.smoke and cfg.train.batch_size == raw["train"]["batch_size"]
    assert json.dumps(short["model"]) == json.dumps(raw["model"])
