"""W&B and MLflow, both without a network: what they hold, after a restart too."""

import json

import pytest

from moe_jax.errors import UserError
from moe_jax.report import trackers
from moe_jax.report.trackers.contract import Start, Tracker

ROWS = {1: {"train/loss": 3.0, "moe/layer_0/load_max": 1.5, "moe/layer_1/load_max": 2.5}}
ROWS[2] = {"train/loss": 2.5, "bleu": "a text", "train/nan": float("nan")}
CONFIG = {f"key.{i}": i for i in range(150)}


def write(workdir, name, monkeypatch, said=None):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    start = Start(workdir, "tests", CONFIG, "")
    opened = trackers.Trackers((name,), start, (said if said is not None else []).append)
    for step, row in ROWS.items():
        opened.scalars(step, row)
    opened.close()
    return opened


@pytest.mark.filterwarnings("ignore")
def test_mlflow_holds_the_rows_and_goes_on_after_a_restart(tmp_path, monkeypatch):
    said = []
    write(tmp_path, "mlflow", monkeypatch, said)
    opened = write(tmp_path, "mlflow", monkeypatch, said)
    assert not said
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    known = json.loads((tmp_path / trackers.FILE).read_text())["mlflow"]
    run = client.get_run(known["identity"])
    assert run.info.status == "FINISHED" and opened.where["mlflow"] == known["where"]
    assert run.data.params["key.149"] == "149"
    history = client.get_metric_history(known["identity"], "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 3.0), (2, 2.5)] * 2
    assert run.data.metrics["moe/layers_max/load_max"] == 2.5
    assert run.data.metrics["moe/layers_min/load_max"] == 1.5
    assert "train/nan" not in run.data.metrics


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_offline_and_keeps_its_identity(tmp_path, monkeypatch):
    said = []
    write(tmp_path, "wandb", monkeypatch, said)
    first = json.loads((tmp_path / trackers.FILE).read_text())["wandb"]
    write(tmp_path, "wandb", monkeypatch, said)
    second = json.loads((tmp_path / trackers.FILE).read_text())["wandb"]
    assert not said and first["identity"] == second["identity"]
    assert list((tmp_path / "wandb").glob(f"offline-run-*/run-{first['identity']}.wandb"))


def test_a_tracker_that_fails_is_left_with_one_line(tmp_path, monkeypatch):
    class Fails:
        identity, where = "7", "nowhere"

        def __init__(self, start):
            assert start.identity == ""

        def scalars(self, step, row):
            raise ConnectionError("the network is gone")

    monkeypatch.setitem(trackers.TRACKERS, "fails", Tracker({}, Fails))
    said = []
    write(tmp_path, "fails", monkeypatch, said)
    assert len(said) == 1 and "fails is left (ConnectionError: the network is gone)" in said[0]


def test_what_is_no_tracker_or_not_installed_is_refused(monkeypatch):
    with pytest.raises(UserError, match="none of mlflow, wandb"):
        trackers.require(("comet",))
    needs = Tracker({"no_such_module": "no-such-package"}, None)
    monkeypatch.setitem(trackers.TRACKERS, "needs", needs)
    with pytest.raises(UserError, match="pip install no-such-package"):
        trackers.require(("needs",))


def test_layers_are_sent_as_extremes_and_names_are_capped(tmp_path, monkeypatch):
    taken = {}

    class Takes:
        identity, where = "7", "here"

        def __init__(self, start):
            pass

        def scalars(self, step, row):
            taken.update(row)

        def close(self):
            pass

    monkeypatch.setitem(trackers.TRACKERS, "takes", Tracker({}, Takes))
    opened = trackers.Trackers(("takes",), Start(tmp_path, "p", {}, ""), print)
    row = {f"moe/layer_{i}/expert_{e}": float(i) for i in range(32) for e in range(64)}
    opened.scalars(1, row | {f"eval/domain/{i}": 1.0 for i in range(300)})
    assert len(taken) == trackers.MOST
