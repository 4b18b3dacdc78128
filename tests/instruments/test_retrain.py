"""Training under a replayed routing: under its own it is the training itself, under another it is
not.
"""

import dataclasses

import jax
import jax.numpy as jnp
import meshes
import pytest
from instrument_cases import probed
from router_cases import compiled

from moe_jax.data.batches import Batches
from moe_jax.errors import UserError
from moe_jax.instruments import held_out, retrain
from moe_jax.moe.routing import sigmoid
from moe_jax.parallel.batch_rows import local_rows, put
from moe_jax.train_step import State, make_model, make_step, make_tx

SMALL = {
    "model.repeats": 1,
    "model.scan": False,
    "train.micro_batch_size": 8,
    "optim.optimizer": "sgd",
    "optim.learning_rate": 0.1,
    "optim.warmup_steps": 0,
}


def begun(run, step):
    """The state of a checkpoint, and the compiled step of the model as it is."""
    tx = make_tx(run.cfg, run.params)
    moments = dict(tx.init(run.params))
    state = State(jnp.int32(step), run.params, run.router_state, moments, None, jnp.int32(0))
    return state, compiled(make_step(run.cfg, make_model(run.cfg.model), tx))


@pytest.mark.full
def test_own_routing_is_the_training_itself_and_no_other_is(float64):
    """Two steps with two micro-batches from step 3 on: the held-out loss of the run, to 1e-12; any
    other way is another.
    """
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes=SMALL)
        state, step_fn = begun(run, 3)
        result = retrain.evaluate(run, run.cfg, state, 2, seed=0)
        size, now = run.cfg.train.batch_size, state
        batches = Batches(run.dataset, "train", run.cfg.seed, size)
        for step in (3, 4):
            rows = local_rows(size)
            now, _ = step_fn(now, put(batches.rows(step, rows), rows, size))
        sums_of = held_out.make_sums(run, run.cfg.model)
        sums = sums_of(now.params, now.router_state, held_out.put_batch(run, run.batches[0]))
    assert abs(result["own"]["loss"] - held_out.figures(run, [sums])["loss"]) < 1e-12
    assert result.keys() == retrain.WAYS.keys()
    for way in result.keys() - {"own"}:
        assert abs(result[way]["gap/loss"]) > 1e-6, way


def test_gates_and_refusals(float64):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes=SMALL)
        moe = run.cfg.model.moe
        assert retrain.gates(moe) == "router"
        raw = dataclasses.replace(
            moe, router_options=dataclasses.replace(moe.router_options, renormalize=False)
        )
        assert (
            retrain.gates(raw)
            == "recorded"
            == retrain.gates(
                dataclasses.replace(moe, router="sigmoid", router_options=sigmoid.Options())
            )
        )
        noisy = probed(changes=SMALL | {"model.moe.router": "noisy_top_k"})
        state = State(jnp.int32(0), noisy.params, noisy.router_state, {}, None, jnp.int32(0))
        with pytest.raises(UserError, match="must have one matrix"):
            retrain.make_learner(run.cfg, state)
