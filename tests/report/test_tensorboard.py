"""What TensorBoard reads of a run: groups in order, a layout, hyperparameters, the load; a resume
hides what it repeats.
"""

import importlib.util
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.plugins.hparams import plugin_data_pb2

from moe_jax.config.config_file import default_values
from moe_jax.instruments.load_over_time import MOST_ROWS, LoadOverTime
from moe_jax.report import tensorboard
from moe_jax.report.event_file import without_torch
from moe_jax.report.metrics import PerStep, Writer, read_rows


def open_writer(path, resume_step=0):
    per_step = PerStep(tokens=1, flops=1)
    return Writer(
        path, resume_step=resume_step, tensorboard=True, active=True, started=0.0, per_step=per_step
    )


def events(path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(
        str(path / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0}
    ).Reload()


def hparams(read):
    """The parts of the tab HParams, by name."""
    found = read.PluginTagToContent("hparams")
    parts = {
        name.removeprefix("_hparams_/"): plugin_data_pb2.HParamsPluginData.FromString(z)
        for name, z in found.items()
    }
    return {name: getattr(part, name) for name, part in parts.items()}


def test_pytorch_is_hidden_from_an_import_and_is_there_after_it(monkeypatch):
    """tensorboardX imports it where it can, which takes a second of every start."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with without_torch(), pytest.raises(ImportError):
        importlib.import_module("torch")
    assert "torch" not in sys.modules and importlib.util.find_spec("torch")
    # Who has imported it himself keeps it.
    monkeypatch.setitem(sys.modules, "torch", sys)
    with without_torch():
        assert importlib.import_module("torch") is sys


def test_scalars_texts_and_images(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(3, {"train/loss": jnp.float32(2.5)})
    writer.text(3, "sample", "once upon a time")
    writer.image(3, "grey", np.eye(4))
    writer.image(3, "colour", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    read = events(tmp_path)
    [scalar] = read.Scalars("1_train/loss")
    assert (scalar.step, scalar.value) == (3, 2.5)
    assert read.Tensors("sample/text_summary")[0].tensor_proto.string_val == [b"once upon a time"]
    assert [(read.Images(t)[0].height, read.Images(t)[0].width) for t in ("grey", "colour")] == [
        (4, 4),
        (4, 6),
    ]
    assert read.Tags()["scalars"] == ["1_train/loss"]  # what was spent is of metrics.jsonl alone


@pytest.mark.parametrize(("resume_step", "steps"), [(20, [10, 20, 21]), (0, [1])])
def test_a_resumed_run_hides_what_it_repeats(tmp_path, resume_step, steps):
    for start, written in (
        (0, (10, 20, 30, 40)),
        (resume_step, (resume_step + 1,)),
    ):  # within one second: two files
        writer = open_writer(tmp_path, start)
        for step in written:
            writer.write(step, {"train/loss": float(step)})
            writer.image(step, "moe/load", np.eye(2))
        writer.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    read = events(tmp_path)
    assert [e.step for e in read.Scalars("1_train/loss")] == steps
    assert [e.step for e in read.Images("4_experts/load")] == steps


def test_what_one_looks_at_first_comes_first():
    """No two names become one, and the first groups are small."""
    names = [
        "train/loss",
        "train/nll",
        "train/grad_norm",
        "train/learning_rate",
        "train/param_norm",
        "train/epoch",
    ]
    names += [
        "train/balance_loss",
        "train/expert_density",
        "eval/loss",
        "eval/bits_per_byte",
        "eval/domain/a/loss",
    ]
    names += [
        "moe/load_max",
        "moe/layer_0/load_max",
        "moe/layer_11/z",
        "perf/mfu",
        "interference/layer_0/rest/z_ratio",
    ]
    tags = {name: tensorboard.tag(name) for name in names}
    assert len(set(tags.values())) == len(names)
    groups = [tag.split("/")[0] for tag in sorted(tags.values())]
    assert groups[:4] == ["1_train"] * 4 and groups[4:6] == ["2_eval"] * 2
    assert (
        tags["moe/layer_0/load_max"] == "8_layers/layer_0/load_max"
        and tags["moe/load_max"] == "4_experts/load_max"
    )
    assert (
        tags["train/balance_loss"] == "6_losses/balance_loss"
        and tags["eval/domain/a/loss"] == "3_domains/a/loss"
    )
    assert all(re.match(r"\d_\w+/", tag) for tag in tags.values())


def test_each_chart_of_the_layout_has_curves(tmp_path):
    writer = open_writer(tmp_path)
    writer.close()
    assert "custom_scalars__config__" in events(tmp_path).Tags()["tensors"]
    names = [
        "train/nll",
        "train/z_loss",
        "eval/loss",
        "eval/domain/a b/loss",
        "eval/domain/a b/bits_per_byte",
    ]
    names += [
        f"moe/layer_0/{name}"
        for name in ("load_max", "dead_experts", "drop_fraction", "router_entropy")
    ]
    tags = [tensorboard.tag(name) for name in names]
    charts = [chart for category in tensorboard.LAYOUT.values() for chart in category.values()]
    found = [
        [tag for tag in tags for pattern in patterns if re.search(pattern, tag)]
        for _, patterns in charts
    ]
    assert all(found) and sorted(tag for tags in found for tag in tags) == sorted(tags)


def test_a_finished_run_is_compared_by_its_final_figures(tmp_path):
    usual = {"seed": 0, "train": {"steps": 10, "batch_size": 2}, "optim": {"clip_norm": 1.0}}
    columns = ("seed", "train.steps", "train.batch_size")
    raw = {**usual, "seed": 3, "optim": {"clip_norm": 0.5}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorboard, "HYPERPARAMETERS", columns)
        patch.setattr(tensorboard, "default_values", lambda: usual)
        values = tensorboard.hyperparameters(raw)
    assert values == {
        "seed": 3,
        "train.steps": 10,
        "train.batch_size": 2,
        "other changes": "optim.clip_norm=0.5",
    }
    writer = open_writer(tmp_path)
    writer.hyperparameters(values)
    writer.write(5, {"eval/loss": 2.0})
    writer.write_final(10, {"eval/loss": 1.0, "eval/domain/a/loss": 1.0}, ["eval/loss"])
    writer.close()
    assert [path.is_file() for path in (tmp_path / "tensorboard").iterdir()] == [
        True
    ]  # no run beside it
    read = events(tmp_path)
    parts = hparams(read)
    assert parts["session_start_info"].hparams["seed"].number_value == 3
    assert (
        parts["session_start_info"].hparams["other changes"].string_value == "optim.clip_norm=0.5"
    )
    assert [metric.name.tag for metric in parts["experiment"].metric_infos] == ["2_eval/loss"]
    assert parts["session_end_info"].status != 0
    assert [(event.step, event.value) for event in read.Scalars("2_eval/loss")] == [
        (5, 2.0),
        (10, 1.0),
    ]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2


def test_every_column_of_the_config_exists():
    values = tensorboard.hyperparameters(default_values())
    assert (
        values["other changes"] == "" and values["optim.optimizer"] == "adamw" and len(values) > 10
    )


def test_the_picture_of_the_load_has_a_row_for_each_step():
    """The panel is searched for its colours: an expert without tokens is the darkest blue, a
    balanced one white.
    """
    load = LoadOverTime(num_experts=4)
    assert not load
    load.note(10, np.array([[0, 8, 8, 16, 99]]))  # the last class is no expert
    load.note(20, np.array([[0, 8, 8, 16, 99]]))
    assert len(load) == 2
    np.testing.assert_allclose(load._load[0], [[0, 1, 1, 2]])
    image = load.picture()
    assert image.dtype == np.uint8 and image.shape[2] == 3
    colours = {tuple(colour) for colour in image.reshape(-1, 3)}
    assert (5, 48, 97) in colours  # RdBu_r at its lower end
    for step in range(30, 30 + 10 * MOST_ROWS, 10):
        load.note(step, np.ones((1, 4)))
    assert len(load) <= MOST_ROWS and load._steps == sorted(load._steps)


@pytest.mark.parametrize(("layers", "num_experts"), [(1, 2), (5, 8), (3, 64), (24, 16)])
def test_the_picture_of_any_model_is_drawn(layers, num_experts):
    load = LoadOverTime(num_experts)
    for step in (1, 2, 3):
        load.note(step, np.random.default_rng(step).integers(0, 9, (layers, num_experts)))
    height, width, _ = load.picture().shape
    assert width < 1500 and height > 200
