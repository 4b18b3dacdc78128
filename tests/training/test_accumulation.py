"""Micro-batches of every size that divides, one row or one group each among them: equal gradients,
and no sharding is lost on the way.
"""

import functools

import jax
import meshes
import numpy as np
import pytest
import tiny

from moe_jax import train_step
from moe_jax.moe import losses
from moe_jax.parallel import batch_rows
from moe_jax.parallel.compiling import QUICK
from moe_jax.plan import abstract
from moe_jax.plan.hlo import program
from moe_jax.tasks import TASKS, contract

ROWS = 4
SMALL = {
    "train.batch_size": ROWS,
    "model.repeats": 1,
    "model.scan": True,
    "model.d_model": 8,
    "model.vocab_size": 16,
    "model.moe.expert_hidden": 8,
    "data.seq_len": 8,
}
VECTORS = {
    "model.kind": "encoder",
    "model.kinds.encoder.inputs": "vectors",
    "model.kinds.encoder.input_dim": 3,
}
ENCDEC = {"task": "translation", "model.kind": "encdec", "model.kinds.encdec.encoder_repeats": 1}
TASK_KEYS = {
    "lm": {},
    "classification": {"task": "classification", "model.kind": "encoder"},
    "vision": {"task": "vision", **VECTORS},
    "speech": {"task": "speech", **VECTORS},
    "translation": ENCDEC,
    "translation_prefix": {
        "task": "translation_prefix",
        "model.kinds.decoder.bidirectional_prefix": True,
    },
    "recommendation": {
        "task": "recommendation",
        "model.kind": "mmoe",
        "model.kinds.mmoe.items": (6,),
    },
}


def changes_of(task, micro, group_rows=1, **more):
    keys = {"train.micro_batch_size": micro, "model.moe.group_rows": group_rows}
    return SMALL | TASK_KEYS[task] | keys | more


def test_every_task_is_here():
    assert TASK_KEYS.keys() == TASKS.keys()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("task", TASK_KEYS)
def test_one_row_or_group_at_a_time_keeps_every_sharding(float64, task, shape):
    """Traced, not compiled: shardings are part of the types."""
    for group_rows in (1, 2) if task == "lm" else (1,):
        # The statistics of a single repeat that is scanned are put beside those of a block before
        # it.
        cfg = tiny.build(
            shape, changes_of(task, group_rows, group_rows, **{"model.prefix": ("moe",)})
        )
        with jax.set_mesh(meshes.make(*shape)):
            model = train_step.make_model(cfg.model)
            params, router_state = jax.eval_shape(model.init, jax.random.key(0))
            batch = abstract.abstract_batch(TASKS[task].random(cfg, 0))
            loss = train_step.make_loss(cfg, model)
            value, _ = jax.eval_shape(loss, params, router_state, batch, jax.random.key(1))
            assert value.shape == ()


@functools.cache
def gradient(task, shape, micro, group_rows):
    """(loss, gradient of the loss) of a random batch, in float64."""
    capacity = (
        {"model.moe.dispatcher": "capacity", "model.allow_leak": True} if group_rows > 1 else {}
    )
    cfg = tiny.build(shape, changes_of(task, micro, group_rows, **capacity))
    with jax.set_mesh(meshes.make(*shape)):
        model = train_step.make_model(cfg.model)
        quickly = functools.partial(jax.jit, compiler_options=QUICK)
        params, router_state = quickly(model.init)(jax.random.key(0))
        kind = TASKS[task]
        batch = batch_rows.put(kind.random(cfg, 0), np.arange(ROWS), ROWS)
        loss = train_step.make_loss(cfg, model)

        def value(params, batch):
            return loss(params, router_state, batch, jax.random.key(1))[0]

        return jax.device_get(quickly(jax.value_and_grad(value))(params, batch))


@pytest.mark.parametrize(
    ("task", "shape", "micro", "group_rows"),
    [
        ("lm", (1, 1, 1), 2, 2),
        pytest.param("lm", (1, 1, 1), 1, 1, marks=pytest.mark.full),
        pytest.param("lm", (1, 1, 2), 1, 1, marks=pytest.mark.full),
        pytest.param("lm", (1, 1, 1), 2, 1, marks=pytest.mark.full),
        pytest.param("vision", (1, 1, 1), 1, 1, marks=pytest.mark.full),
        pytest.param("translation", (1, 1, 1), 1, 1, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_one_row_or_group_at_a_time_has_the_gradient_of_the_batch(
    float64, task, shape, micro, group_rows
):
    want, got = gradient(task, shape, ROWS, group_rows), gradient(task, shape, micro, group_rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), want, got)


ADDS_UP = {
    "model.moe.losses.balance": 0.0,
    "model.moe.losses.micro_batch_balance": 0.1,
    "model.moe.losses.sequence_balance": 0.1,
    "model.moe.losses.z": 0.1,
    "model.logit_z_loss": 0.1,
    "model.remat": "attention+experts",
}


@pytest.fixture(scope="module")
def in_one_pass():
    """(what one pass gives, what the gradient of the whole loss gives, FLOPs of both), of a batch
    with padding, a row of nothing else among it.
    """
    with jax.enable_x64(True):
        cfg = tiny.build((2, 1, 1), changes_of("lm", 2, **ADDS_UP))
        with jax.set_mesh(meshes.make(2, 1, 1)):
            model = train_step.make_model(cfg.model)
            params, router_state = jax.jit(model.init)(jax.random.key(0))
            batch = TASKS["lm"].random(cfg, 0)
            batch.segment_BS[0] = 0
            batch.segment_BS[1, 3:] = 0
            batch = batch_rows.put(batch, np.arange(ROWS), ROWS)
            loss = train_step.make_loss(cfg, model)
            found = []
            for function in (
                train_step.make_gradient(cfg, model, loss),
                jax.value_and_grad(loss, has_aux=True),
            ):
                lowered = jax.jit(function).lower(params, router_state, batch, jax.random.key(1))
                compiled = lowered.compile(compiler_options=QUICK)
                result = compiled(params, router_state, batch, jax.random.key(1))
                products = program.read(compiled.as_text(), {"data": 2}).products
                found.append((jax.device_get(result), products.flops.total()))
    return found


def test_losses_that_add_up_have_the_gradient_of_the_batch_in_one_pass(in_one_pass):
    (got, _), (want, _) = in_one_pass
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), want, got)


def test_one_pass_computes_no_micro_batch_twice(in_one_pass):
    """Three forward passes, and a part of a fourth that the blocks compute again, beside one more
    of everything.
    """
    (_, one), (_, two) = in_one_pass
    assert 0.6 < one / two < 0.85


def slope(name, factor):
    """The gradient of a loss by its totals, where all sums but the numbers are times `factor`."""
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("counts", "probs", "importance", "load", "first"), (2, 4))
    shapes |= dict.fromkeys(("tokens", "sequences", "micro_batches", "z"), (2,))
    shapes |= dict.fromkeys(("sequence_balance", "micro_batch_balance"), (2,))
    totals = {key: 1 + rng.random(shape) for key, shape in shapes.items()}
    totals |= {
        key: total * np.linspace(1, factor, total.size).reshape(total.shape)
        for key, total in totals.items()
        if key not in contract.NUMBERS
    }

    def value(rest):
        return losses.LOSSES[name].value(totals | rest).sum()

    return jax.grad(value)({key: x for key, x in totals.items() if key not in contract.NUMBERS})


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_that_adds_up_has_the_same_gradient_at_all_sums(float64, name):
    one, other = slope(name, 1), slope(name, 3)
    differs = max(np.abs(one[key] - other[key]).max() for key in one)
    assert losses.LOSSES[name].adds_up == (differs < 1e-12)
