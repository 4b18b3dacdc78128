"""`convert compact`: what may go, what the outputs say, blocks, and what reads the result."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny

from moe_jax import checkpoint, config, train_step
from moe_jax.__main__ import main as entry
from moe_jax.commands import convert, generate
from moe_jax.commands.conversions import compact as compact_command
from moe_jax.data.tokenizer import bytes_tokenizer
from moe_jax.errors import UserError
from moe_jax.moe import sparse
from moe_jax.moe.sparse import compact, stored
from moe_jax.parallel import mesh
from moe_jax.run import open_run
from moe_jax.surgery import compacting
from moe_jax.tasks import TASKS

NARROW = {
    "model.param_dtype": "float32",
    "model.dtype": "float32",
    "model.num_heads": 2,
    "model.repeats": 1,
}
NARROW |= {"model.moe.num_experts": 4, "train.batch_size": 8}


def layer(seed=0, e=2, d=4, p=2, f=6):
    rng = np.random.default_rng(seed)
    return {
        "w_in": rng.normal(size=(e, d, p, f)).astype("f"),
        "w_out": rng.normal(size=(e, f, d)).astype("f"),
    }


def without(w, expert, units):
    w["w_in"][expert][..., units] = 0
    w["w_out"][expert][units] = 0


def run(folder, zeros, given=None):
    """A run's directory with the first values of a model, after `zeros(layer)` of each of its
    layers.
    """
    raw = tiny.raw({**NARROW, **(given or {}), "mesh.data": 1})
    cfg = tiny.build((1, 1, 1), {**NARROW, **(given or {})})
    with jax.set_mesh(meshes.make(1, 1, 1)):
        params, router_state = jax.device_get(
            jax.jit(train_step.make_model(cfg.model).init)(jax.random.key(0))
        )
        params = jax.tree.map(np.array, params)
        for _, experts in sparse.experts_of(params):
            zeros(experts)
        parts = {"params": params, "router_state": router_state}
        if cfg.optim.ema_decay:
            parts["ema"] = jax.tree.map(lambda x: x / 2, params)
        saves = checkpoint.Checkpoints(folder / "checkpoints", every=0, keep=1, keep_best=0)
        saves.save(7, jax.tree.map(jnp.asarray, parts), metadata={}, score=None, stacked=False)
        saves.close()
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "labels.json").write_text('["a", "b"]')
    return folder


def compacted(source, out, *flags):
    return entry(["convert", "compact", "--workdir", str(source), "--out", str(out), *flags])


def test_what_lives():
    w = layer()
    w["w_out"][0, 1] = 0  # nothing leaves unit 1
    w["w_in"][0, :, 0, 2] = 0  # no gate: silu(0) = 0
    w["w_in"][0, :, 1, 3] = 0  # no up: 0 * gate
    w["w_in"][0, :3, :, 4] = 0  # one weight of each is left
    assert (
        compact.living(w)[0].tolist() == [True, False, False, False, True, True]
        and compact.living(w)[1].all()
    )
    thin = compact.narrow(w, 6)
    np.testing.assert_array_equal(thin["w_out"][0, :3], w["w_out"][0, [0, 4, 5]])
    np.testing.assert_array_equal(thin["w_in"][0, :, :, :3], w["w_in"][0][:, :, [0, 4, 5]])
    assert not thin["w_in"][0, :, :, 3:].any() and not thin["w_out"][0, 3:].any()
    np.testing.assert_array_equal(thin["w_in"][1], w["w_in"][1])


def test_widths_that_a_model_may_have():
    assert list(compact.widths(5, 16, 1, 0))[:3] == [5, 6, 7]
    assert list(compact.widths(5, 16, 4, 0)) == [8, 12, 16]
    # 3 shared experts of 16 = 48 columns: 4 of 12 or 3 of 16, but no number of 15
    assert list(compact.widths(9, 16, 1, 3)) == [12, 16]


def test_blocks_by_hand():
    # 2 x 2 blocks of [4, 4]: column 0 has both, column 1 the lower one
    matrix = np.array([[[1, 2, 0, 0], [3, 0, 0, 0], [0, 4, 5, 6], [7, 8, 0, 9]]], np.float32)
    assert stored.used(matrix, 2).tolist() == [[[True, True], [False, True]]]
    values, places = stored.pack(matrix, 2, 2)
    assert places.tolist() == [[[0, 1], [1, 0]]]
    assert values[0, 1].tolist() == [[5, 6], [0, 9], [0, 0], [0, 0]]
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_allclose(
        stored.product(jnp.array(x), jnp.array(values[0]), jnp.array(places[0])),
        x @ matrix[0],
        rtol=1e-6,
    )
    w = {"w_in": matrix[:, :, None, :], "w_out": matrix}
    assert compact.blocks([w], 2) == compact.Blocks(2, 2, 2, 1.0)


def dead_units(w):
    for expert in range(4):
        without(w, expert, [1, 3, 5, 7, 8 + expert])  # 11 live of 16


def test_units_go_and_outputs_stay(tmp_path, capsys):
    source = run(tmp_path / "run", dead_units, {"optim.ema_decay": 0.5})
    assert compacted(source, tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert (
        "model.moe.expert_hidden 16 -> 11: the fullest expert of all layers has 11 living units of "
        "16" in told
    )
    deviation = float(re.search(r"largest deviation (\S+) of", told)[1])
    assert deviation <= 1e-6
    counts = re.search(r"parameters: ([\d,]+) -> ([\d,]+)", told)
    before, after = (int(text.replace(",", "")) for text in counts.groups())
    assert before - after == 4 * 5 * 16 * 3  # experts x units x width x (gate, up, out)
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["a", "b"]
    made = open_run(tmp_path / "out")
    cfg = made.config
    assert cfg.model.moe.expert_hidden == 11 and cfg.model.moe.sparse.rule == "none"
    with jax.set_mesh(meshes.make(1, 1, 1)):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a / 2, b),
            jax.device_get(made.parameters),
            jax.device_get(made.moving_average),
        )
        # as train.init_from reads it
        like = jax.eval_shape(train_step.make_model(cfg.model).init, jax.random.key(0))[0]
        _, found = checkpoint.load_params(
            tmp_path / "out" / "checkpoints",
            like,
            stacked=False,
            rename={},
            part="params",
            step=None,
        )
        assert not found.left


def test_shared_experts_and_the_model_axis_round_the_width_up(tmp_path, capsys):
    source = run(tmp_path / "run", dead_units, {"model.moe.shared_experts": 3})
    assert compacted(source, tmp_path / "out") == 0
    assert "16 -> 12: " in capsys.readouterr().out
    moe = open_run(tmp_path / "out").config.model.moe
    assert (moe.expert_hidden, moe.shared_experts) == (12, 4)
    raw = json.loads((source / "config.json").read_text())
    raw["mesh"]["model"] = 4
    assert compacting.new_width(raw, [layer(f=16)], 0)[0] == 16


def few_blocks(w):
    """One block of 4 x 4 in every column of blocks: a quarter."""
    one = np.kron(np.eye(4)[[2, 0, 3, 1]], np.ones((4, 4)))
    w["w_in"] *= one[None, :, None, :]
    w["w_out"] *= one[None]


@pytest.mark.parametrize("format", ["auto", "blocks", "dense"])
def test_blocks_are_stored_on_demand(tmp_path, capsys, format):
    given = {"model.moe.sparse.rule": "static", "model.moe.sparse.pattern": "blocks"}
    source = run(
        tmp_path / "run", few_blocks, {**given, "model.moe.sparse.patterns.blocks.block": 4}
    )
    assert compacted(source, tmp_path / "out", "--format", format) == 0
    told = capsys.readouterr().out
    cfg = open_run(tmp_path / "out").config
    if format != "blocks":
        assert cfg.model.moe.sparse.stored.block == 0
        assert ("blocks of this side are faster up to 0%" in told) == (format == "auto")
        return
    assert "stored so, for inference alone" in told and cfg.model.moe.sparse.stored.block == 4
    assert float(re.search(r"largest deviation (\S+) of", told)[1]) <= 1e-6
    with (
        jax.set_mesh(meshes.make(1, 1, 1)),
        pytest.raises(UserError, match="can be evaluated and decoded, but not trained"),
    ):
        jax.eval_shape(train_step.initial(cfg, train_step.make_model(cfg.model)), jax.random.key(0))


@pytest.mark.parametrize(
    ("block", "used", "of", "stored"),
    [
        (16, 1, 64, False),
        (32, 16, 64, True),
        (32, 17, 64, False),
        (64, 8, 20, True),
        (64, 9, 20, False),
    ]
    + [(128, 2, 4, True), (128, 3, 4, False), (256, 1, 2, True)],
)
def test_auto_stores_blocks_up_to_the_share_that_pays(block, used, of, stored):
    """Of `of` blocks in every column of blocks `used` are not zero: the limits of
    docs/sparse_weights.md.
    """
    side = block * of
    column = np.repeat(np.arange(of) < used, block)[None, :, None]
    w = {
        "w_in": np.broadcast_to(column[..., None], (1, side, 1, block)),
        "w_out": np.zeros((1, block, block)),
    }
    w["w_out"] = w["w_in"][:, :, 0]  # one matrix twice: only counts matter here
    form, text = compacting.block_format([w], block, compacting.Asked(Path(), "auto", block))
    assert (form is not None) == stored and ("whole matrices stay" in text) != stored


def test_blocks_on_a_mesh_give_the_same(tmp_path):
    """Experts over devices; the columns of a block are not split."""
    source = run(tmp_path / "run", few_blocks)
    assert compacted(source, tmp_path / "out", "--format", "blocks", "--block", "4") == 0

    def outputs(folder, shape):
        raw = json.loads((folder / "config.json").read_text())
        lengths = mesh.Lengths(**dict(zip(mesh.WRITTEN, shape, strict=True)))
        cfg = config.build({**raw, "mesh": lengths.written()}, int(np.prod(shape)))
        with jax.set_mesh(meshes.make(*shape)):
            run = dataclasses.replace(open_run(folder), config=cfg)
            values = run.parameters, run.router_state
            task, model = TASKS[cfg.task], train_step.make_model(cfg.model)
            batch = tiny.put(cfg, tiny.batch(cfg))

            def run_it(values, batch):
                return task.losses(model.bind(*values), batch, jax.random.key(0), False).outputs

            return np.asarray(jax.jit(run_it)(values, batch))

    np.testing.assert_allclose(
        outputs(source, (1, 1, 1)), outputs(tmp_path / "out", (2, 4, 1)), atol=1e-5
    )
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(UserError, match=r"mesh.model \(2\) must be 1 for experts stored as blocks"):
        config.build({**raw, "mesh": mesh.Lengths(model=2).written()}, 2)


def test_mistakes(tmp_path, capsys):
    source = run(tmp_path / "run", lambda w: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for flags, message in (
        ((source, tmp_path / "full"), "full is not empty: name a new directory"),
        ((tmp_path / "none", tmp_path / "a"), "holds no run"),
        (
            (source, tmp_path / "b", "--format", "blocks"),
            "--format blocks needs the side of a block",
        ),
        (
            (source, tmp_path / "b", "--format", "dense", "--block", "4"),
            "so --block 4 would do nothing",
        ),
        (
            (source, tmp_path / "c", "--format", "blocks", "--block", "5"),
            "--block 5 must divide model.d_model (16)",
        ),
    ):
        assert compacted(*flags) == 64
        assert message in capsys.readouterr().err


VECTORS = {"task": "vision", "model.kind": "encoder", "model.kinds.encoder.inputs": "vectors"}
VECTORS |= {"model.kinds.encoder.input_dim": 4, "model.kinds.encoder.learned_positions": 8}


def test_an_encoder_of_vectors(tmp_path, capsys):
    source = run(tmp_path / "run", dead_units, VECTORS)
    assert compacted(source, tmp_path / "out") == 0
    told = capsys.readouterr().out
    assert "16 -> 11" in told and float(re.search(r"largest deviation (\S+) of", told)[1]) <= 1e-6
    for command, message in (
        (
            ["generate", "--prompt", "x"],
            'is a run of task = "vision" (model.kind "encoder"), which has no text',
        ),
        (
            ["probe"],
            'is a run of task "vision", model.kind "encoder": the instruments look into the '
            "language",
        ),
    ):
        assert entry([*command, "--workdir", str(tmp_path / "out")]) == 64
        assert message in capsys.readouterr().err


def test_what_nobody_compared_is_taken_away(tmp_path, monkeypatch):
    source = run(tmp_path / "run", dead_units)

    def fails(*weights):
        raise KeyboardInterrupt

    monkeypatch.setattr(compact_command, "compare", fails)
    with pytest.raises(KeyboardInterrupt):
        convert.main(["compact", "--workdir", str(source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and (source / "checkpoints").is_dir()


def test_blocks_decode_to_the_same_text(tmp_path, capsys):
    source = run(tmp_path / "run", few_blocks, {"model.vocab_size": 256})
    bytes_tokenizer().save(source / "tokenizer")
    assert compacted(source, tmp_path / "out", "--format", "blocks", "--block", "4") == 0
    assert open_run(tmp_path / "out").config.model.moe.sparse.stored.block == 4

    def text(folder):
        capsys.readouterr()
        flags = ["--prompt", "To be", "--temperature", "0", "--max_tokens", "12"]
        assert generate.main(["--workdir", str(folder), *flags]) == 0
        return capsys.readouterr().out

    assert text(source) == text(tmp_path / "out") and len(text(source)) > 6
    assert (
        entry(
            [
                "probe",
                "--workdir",
                str(tmp_path / "out"),
                "--what",
                "interference",
                "--batches",
                "1",
            ]
        )
        == 64
    )
    assert (
        "interference needs gradients, and experts stored as blocks have none"
        in capsys.readouterr().err
    )
