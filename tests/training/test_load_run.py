"""`moe_jax.load_run`: a finished run as objects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax import begin
from moe_jax.checkpoint import Checkpoints
from moe_jax.data.tokenizer import bytes_tokenizer
from moe_jax.errors import UserError
from moe_jax.report import metrics
from moe_jax.run import load_run, open_run
from moe_jax.tasks.lm import task as lm

KEY = jax.random.key(0)
TINY32 = {"model.param_dtype": "float32", "model.dtype": "float32", "model.vocab_size": 256}


def saved(workdir, changes=None, steps=(1,)):
    """A run of one device as training leaves it."""
    program = tiny.Program((1, 1, 1), {**TINY32, **(changes or {})})
    raw = tiny.raw({**TINY32, **(changes or {}), "mesh.data": 1})
    saves = Checkpoints(workdir / "checkpoints", every=0, keep=9, keep_best=0)
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        for step in steps:
            state = state._replace(step=jnp.int32(step))
            about = {"config": raw, "data": "0"}
            saves.save(step, state, metadata=about, score=None, stacked=program.cfg.model.scan)
        saves.close()
        metrics.write_run_info(workdir, raw, mesh={}, active=True)
    bytes_tokenizer().save(workdir / "tokenizer")
    return program, state


def test_a_run_is_loaded_without_a_mesh(tmp_path, capsys):
    changes = {"optim.ema_decay": 0.9, "model.scan": False}
    program, state = saved(tmp_path, changes, steps=(1, 2))
    run = load_run(tmp_path)
    assert (run.step, run.steps(), run.notes) == (2, [1, 2], ())
    assert run.raw["optim"]["ema_decay"] == 0.9 and run.config.optim.ema_decay == 0.9
    assert run.tokenizer.vocab_size == 256 and run.judged is run.moving_average
    jax.tree.map(np.testing.assert_array_equal, run.parameters, state.params)
    assert run.at(1).step == 1 and load_run(tmp_path, 1).step == 1
    inputs = tiny.batch(program.cfg)
    with jax.set_mesh(run.mesh):
        batch = tiny.put(program.cfg, inputs)
        by_run, direct = (
            jax.jit(lambda batch, model=model: lm.TASK.losses(model, batch, KEY, False).outputs)(
                batch
            )
            for model in (run.model, program.model.bind(state.ema, state.router_state))
        )
        np.testing.assert_array_equal(by_run, direct)
    assert capsys.readouterr().err == ""


def test_a_smoke_run_is_told_by_whatever_loads_it(tmp_path, capsys):
    program, state = saved(tmp_path, {"smoke": True})
    line = f"{tmp_path} is a smoke run (--smoke): a few steps of training, nothing was learned"
    assert load_run(tmp_path).notes == (line,)
    assert capsys.readouterr().err == line + "\n"
    assert open_run(tmp_path, silent=True).notes == (line,)
    assert capsys.readouterr().err == ""
    cfg = tiny.build((1, 1, 1), {**TINY32, "train.init_from": str(tmp_path)})
    with jax.set_mesh(program.mesh):
        _, notes = begin.inherited(cfg, state, None)
    assert notes[0] == f"train.init_from={line}"


def test_what_is_not_there_is_one_line(tmp_path):
    saved(tmp_path / "run")
    for workdir, step, message in (
        (tmp_path / "none", None, "holds no run, because"),
        (tmp_path / "run", 7, "there is no checkpoint of step 7"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_run(workdir, step)
        assert "\n" not in str(error.value)
