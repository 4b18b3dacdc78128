"""What model.remat names is kept of the first round of a dispatcher alone."""

import contextlib

import jax
import meshes
import tiny

from moe_jax import train_step
from moe_jax.moe import kept
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.plan import abstract, dispatch
from moe_jax.tasks import TASKS

CHANGES = {
    "model.repeats": 1,
    "model.remat": "experts",
    "model.moe.dispatchers.dropless.buffer": 1.0,
}


def shapes_of(jaxpr):
    """The shapes of all values of a traced function, inside of its loops and branches, too."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {getattr(var.aval, "shape", ()) for var in equation.outvars}
        for value in equation.params.values():
            for one in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(one, "jaxpr", one)
                if hasattr(inner, "eqns"):
                    found |= shapes_of(inner)
    return found


def kept_of_rounds():
    """(whether rows of a round are there, whether those of all further rounds are, stacked)."""
    cfg = tiny.build((1, 4, 1), CHANGES)
    with jax.set_mesh(meshes.make(1, 4, 1)):
        model = train_step.make_model(cfg.model)
        params, router_state = jax.eval_shape(model.init, jax.random.key(0))
        batch = abstract.abstract_batch(TASKS["lm"].random(cfg, 0))
        gradient = jax.value_and_grad(train_step.make_loss(cfg, model), has_aux=True)
        traced = jax.make_jaxpr(gradient)(params, router_state, batch, jax.random.key(1))
        shape = dispatch.buffer_shape(cfg)
        lossless = DISPATCHERS["dropless"]
        worst = lossless.rows(shape, lossless.options(buffer=0.0))
        rows = lossless.rows(shape, cfg.model.moe.dispatcher_options)
    found = shapes_of(traced.jaxpr)
    further = -(-worst // rows) - 1
    assert further > 0
    width = cfg.model.d_model
    return (rows, width) in found, (further, rows, width) in found


def test_rows_of_further_rounds_are_not_kept(float64):
    assert kept_of_rounds() == (True, False)


def test_they_would_be_if_they_were_named(float64, monkeypatch):
    monkeypatch.setattr(kept, "nothing", contextlib.nullcontext)
    assert kept_of_rounds() == (True, True)
