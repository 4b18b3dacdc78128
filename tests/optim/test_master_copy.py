"""Parameters in bfloat16: what small updates come to, with a master copy in float32 and without;
and what is in float32 anyway.
"""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny

from moe_jax import checkpoint, config, optim, train, train_step
from moe_jax.config import advice
from moe_jax.errors import UserError
from moe_jax.moe import sparse
from moe_jax.verify import shrink

BASE = {
    "model.param_dtype": "bfloat16",
    "model.dtype": "float32",
    "model.repeats": 1,
    "optim.warmup_steps": 0,
    "optim.schedule": "constant",
    "optim.learning_rate": 1e-5,
    "optim.optimizers.adamw.weight_decay": 0.0,
}
COPY = {"optim.master_copy": True}


class Descent:
    """`train_step.descend` along one gradient, the same at every step, on one device."""

    def __init__(self, changes):
        self.cfg = tiny.build(changes=BASE | changes)
        self.first = jax.jit(train_step.initial(self.cfg, train_step.make_model(self.cfg.model)))(
            jax.random.key(0)
        )
        self.tx = train_step.make_tx(self.cfg, self.first.params)
        self.step = jax.jit(self._step)

    def _step(self, now, grads):
        _, moved, opt_state, masks = train_step.descend(
            self.cfg, self.tx, now, grads, train_step.step_key(self.cfg, now.step)
        )
        return train_step.advanced(self.cfg, now, moved)._replace(
            step=now.step + 1, opt_state=opt_state, masks=masks
        )

    def run(self, steps):
        """The state after some steps down a constant slope."""
        now, slope = self.first, jax.tree.map(jnp.ones_like, self.first.params)
        for _ in range(steps):
            now = self.step(now, slope)
        return now


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(meshes.make(1, 1, 1)):
        yield


def way(run, steps):
    """How far a weight of the attention has gone on average; Adam takes every weight one learning
    rate down at each step.
    """

    def place(now):
        return np.asarray(
            now.params["repeats"][0]["blocks"][0]["attention"]["weights"]["q"], np.float32
        )

    return float((place(run.first) - place(run.run(steps))).mean())


def test_small_updates_are_lost_without_a_copy_and_add_up_with_one():
    """100 steps of 1e-5 are a way of 1e-3.

    The next number above 0.25 is 2^-9 away, so that one step of 1e-5 does not get there.
    """
    assert way(Descent({"model.param_dtype": "float32"}), 100) == pytest.approx(1e-3, rel=1e-3)
    assert way(Descent(COPY), 100) == pytest.approx(1e-3, rel=0.3)
    assert way(Descent({}), 100) < 1e-4


def test_the_copy_is_the_parameters_to_more_digits():
    now = Descent(COPY | {"optim.ema_decay": 0.5}).run(3)
    for wide, narrow in zip(jax.tree.leaves(now.master), jax.tree.leaves(now.params), strict=True):
        assert wide.dtype == jnp.float32
        np.testing.assert_array_equal(wide.astype(narrow.dtype), narrow)
    assert Descent({}).first.master == () and train_step.updated(now) is now.master


def test_zeros_of_sparse_experts_are_zeros_of_the_copy():
    zeros = {
        "model.moe.sparse.rule": "static",
        "model.moe.sparse.patterns.unstructured.density": 0.5,
    }
    now = Descent(COPY | zeros).run(2)
    for tree in (now.params, now.master):
        (_, layer), *_ = sparse.experts_of(tree)
        assert float((layer["w_in"] != 0).mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_moments_of_bfloat16_parameters_are_in_float32(name):
    """And the first update is that of the same parameters kept in float32, bit for bit."""
    keys = {"optim.optimizer": name}
    adamw = "optim.optimizers.adamw.weight_decay"
    base = {key: value for key, value in BASE.items() if name == "adamw" or key != adamw} | keys
    cfg = tiny.build(changes=base)
    params = {
        "w_out": jnp.linspace(-1, 1, 32, dtype=jnp.bfloat16).reshape(8, 4),
        "bias": jnp.ones(4, jnp.bfloat16),
    }

    def update(params):
        tx = optim.make(cfg.optim, params, stacked=False)
        grads = jax.tree.map(jnp.sin, params)
        return tx.update(grads, tx.init(params), params)

    updates, moments = update(params)
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves((updates, moments)))
    wide = jax.tree.map(lambda x: jnp.sin(x).astype(jnp.float32), params)
    tx = optim.make(cfg.optim, params, stacked=False)
    same, _ = tx.update(wide, tx.init(optim.wide_copy(params)), optim.wide_copy(params))
    jax.tree.map(np.testing.assert_array_equal, updates, same)


def test_moments_that_were_saved_in_bfloat16_go_on_in_float32(tmp_path, caplog):
    now = Descent({}).run(2)
    old = now._replace(
        opt_state=jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, now.opt_state)
    )
    saves = checkpoint.Checkpoints(tmp_path, every=1, keep=1, keep_best=0)
    saves.save(2, old, metadata={}, score=None, stacked=False)
    saves.close()
    back = checkpoint.Checkpoints(tmp_path, every=1, keep=1, keep_best=0).restore(
        2, now, stacked=False
    )
    assert "has moments in bfloat16: they go on in float32" in caplog.text
    for saved, read in zip(
        jax.tree.leaves(old.opt_state), jax.tree.leaves(back.opt_state), strict=True
    ):
        assert read.dtype != jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(saved, read.dtype), read)


def test_the_copy_begins_with_all_digits_of_another_run(tmp_path):
    first = Descent({"model.param_dtype": "float32"}).run(1)
    saves = checkpoint.Checkpoints(tmp_path / "old" / "checkpoints", every=1, keep=1, keep_best=0)
    saves.save(1, first, metadata={}, score=None, stacked=False)
    saves.close()
    run = Descent(COPY | {"train.init_from": str(tmp_path / "old")})
    new = checkpoint.Checkpoints(tmp_path / "new", every=1, keep=1, keep_best=0)
    begun, _ = train.begin(run.cfg, new, {}, lambda key: run.first, run.first)
    jax.tree.map(np.testing.assert_array_equal, begun.master, first.params)
    assert {x.dtype for x in jax.tree.leaves(begun.params)} == {
        x.dtype for x in jax.tree.leaves(run.first.params)
    }


def test_what_is_said_of_it():
    (said,) = advice.notes(tiny.build(changes=BASE))
    assert (
        "rounds away every update below 1/512 of a weight" in said
        and "optim.master_copy=True" in said
    )
    assert not list(advice.notes(tiny.build(changes=BASE | COPY)))
    with pytest.raises(
        UserError, match=r"optim.master_copy = True does nothing: model.param_dtype = float32"
    ):
        tiny.build(changes=BASE | COPY | {"model.param_dtype": "float32"})
    small, _ = shrink.shrink(tiny.raw(BASE | COPY | {"mesh.data": 1}))
    assert not config.build(small, 1).optim.master_copy
