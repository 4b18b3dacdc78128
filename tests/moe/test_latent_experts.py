"""Experts that work in a narrower width (moe/latent.py): the oracle, what travels, what is counted,
what is refused. tests/verify has them on every mesh.

Shapes: T tokens, D 16 model, L 8 latent, E experts.
"""

from types import SimpleNamespace

import jax
import meshes
import numpy as np
import oracle
import pytest
import surgery_cases
import tiny
from flax import nnx
from suites import normal

from moe_jax import train_step
from moe_jax.errors import UserError
from moe_jax.models.block import moe_config
from moe_jax.moe.layer import Batch, MoELayer
from moe_jax.parallel.mesh import ONE, Lengths
from moe_jax.plan import dispatch, flops, theory
from moe_jax.run import open_run
from moe_jax.surgery import operations, snapshot
from moe_jax.surgery.operate import Asked, operated
from moe_jax.surgery.operations import There
from moe_jax.surgery.upcycle import new_raw
from moe_jax.surgery.weights import gaps
from moe_jax.verify import reference, states
from moe_jax.verify.program import Program
from moe_jax.verify.run import against
from moe_jax.verify.run import reference as steps_of_reference

LATENT = {"model.moe.latent_dim": 8}
TOP_K = {
    "model.moe.router": "top_k",
    "model.moe.routers.top_k.k": 2,
    "model.moe.dispatcher": "dropless",
}


# The oracle.


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 2)], ids=meshes.name)
def test_the_layer_is_that_of_the_oracle(float64, shape):
    """Output and every gradient; the router sees the tokens in the model's width."""
    cfg = moe_config(tiny.build(changes=LATENT | TOP_K).model)
    rng = np.random.default_rng(0)
    x_BSD, dy_BSD = rng.normal(size=(2, 8, 4, 16))
    ones_BS = np.ones((8, 4), np.int32)
    with jax.set_mesh(meshes.make(*shape)):

        def split(key):
            return nnx.split(MoELayer(key, cfg), nnx.Param, ...)

        graph, _, rest = nnx.eval_shape(split, jax.random.key(0))
        params = jax.jit(lambda key: split(key)[1])(jax.random.key(0))
        rows = np.arange(8, dtype=np.int32)
        batch = Batch(*(meshes.put(z, "batch") for z in (ones_BS, ones_BS, ones_BS, rows)))
        x, dy = meshes.put(x_BSD, "batch"), meshes.put(dy_BSD, "batch")

        def loss(params, x):
            y, _ = nnx.merge(graph, params, rest)(x, batch, jax.random.key(1), True)
            return (y * dy).sum(), y

        run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (of_params, dx), y = jax.device_get(run(params, x))
    values = jax.device_get(nnx.to_pure_dict(params))
    gradients = nnx.to_pure_dict(of_params)
    x_TD, dy_TD = x_BSD.reshape(-1, 16), dy_BSD.reshape(-1, 16)
    gate_DE = values["router"]["gate"]
    chosen_TK, gate_TK, _ = oracle.top_k(x_TD, gate_DE, 2)
    pairs = list(np.ndindex(chosen_TK.shape))
    listed = [(t, chosen_TK[t, j], gate_TK[t, j]) for t, j in pairs]
    latent, experts = values["latent"], values["experts"]
    weights = (latent["down"], latent["up"], experts["w_in"], experts["w_out"])
    want, dx_TD, dgates, ddown, dup, dw_in, dw_out = oracle.latent_experts(
        x_TD, listed, *weights, dy_TD
    )
    of_router, dgate = oracle.top_k_backward(x_TD, gate_DE, 2, dgates.reshape(chosen_TK.shape))
    compared = {
        "y": (y.reshape(want.shape), want),
        "x": (dx.reshape(want.shape), dx_TD + of_router),
        "gate": (gradients["router"]["gate"], dgate),
        "down": (gradients["latent"]["down"], ddown),
        "up": (gradients["latent"]["up"], dup),
        "w_in": (gradients["experts"]["w_in"], dw_in),
        "w_out": (gradients["experts"]["w_out"], dw_out),
    }
    assert values["experts"]["w_in"].shape[1] == 8
    for name, (have, right) in compared.items():
        np.testing.assert_allclose(have, right, atol=1e-11, err_msg=name)


@pytest.mark.parametrize(
    "router",
    [
        {"model.moe.router": "null", "model.moe.routers.null.kind": "copy"},
        pytest.param(
            {"model.moe.router": "soft", "model.moe.dispatcher": "slots", "model.allow_leak": True},
            marks=pytest.mark.full,
        ),
    ],
    ids=["copies", "slots"],
)
def test_plain_arithmetic_of_verify_knows_them(float64, router):
    """A token's copy of itself has the model's width; slots are mixed in the narrow one."""
    program = Program(tiny.raw({"model.repeats": 1, **LATENT, **router}), ONE)
    compared = reference.compare(program)
    assert compared.output < 1e-12 and compared.gradient < 1e-11


MESHES = {
    "2x2x2": (Lengths(2, 2, 2), {}),
    "split rows": (Lengths(expert=2, seq=2, model=2), {"model.scan": True}),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", normal(["split rows"], MESHES))
def test_a_mesh_changes_nothing(float64, name, tmp_path):
    lengths, layout = MESHES[name]
    changes = LATENT | {
        "model.repeats": 1,
        "model.head_dim": 4,
        "model.moe.shared_experts": 1,
        "model.moe.expert_bias": True,
        "model.moe.dispatcher": "capacity",
        "data.seq_len": 16,
    }
    one = steps_of_reference(tiny.raw(changes), 2)
    states.write(one.program, one.begin, tmp_path / "begin")
    program = Program(tiny.raw(changes | layout), lengths).compile()
    end, _, first = against(one, program, states.read(program, tmp_path / "begin"))
    assert first is None, first
    assert not states.unequal(program, end, one.program, tmp_path / "end")


# What travels and what is counted.


def test_the_bytes_of_the_dispatch_fall_with_the_width(float64):
    """D 64: rows of 16 numbers are a fourth of rows of 64, and so is what the plan expects."""
    sizes = {"model.d_model": 64, "model.moe.expert_hidden": 32, **TOP_K}
    forward, expected, row = {}, {}, {}
    for width in (0, 16):
        changes = sizes | {"model.moe.latent_dim": width}
        cfg = tiny.build((1, 4, 1), changes)
        with jax.set_mesh(meshes.make(1, 4, 1)):
            forward[width] = dispatch.of_layer(cfg).forward["expert"]
        expected[width], row[width] = theory.tokens(cfg), dispatch.row_bytes(cfg)
    assert expected[16] * 4 == expected[0]
    # Beside the rows travel gates and numbers of experts, which have no width.
    assert 0.25 <= forward[16] / forward[0] < 0.3
    # A row in and out, and two parts of 32 hidden columns, in float64.
    assert row == {0: (2 * 64 + 64) * 8, 16: (2 * 16 + 64) * 8}


def test_parameters_and_flops_by_hand(float64):
    """D 16, L 8, F 16, 8 experts of which 2 are chosen; SwiGLU: 3 L F weights each."""
    cfg = tiny.build(changes={"model.repeats": 1, **LATENT, **TOP_K}).model
    with jax.set_mesh(meshes.make(1, 1, 1)):
        params, _ = jax.eval_shape(train_step.make_model(cfg).init, jax.random.key(0))
    counts, work = flops.parameters(cfg), flops.forward_per_token(cfg, 8)
    assert counts.total == sum(x.size for x in jax.tree.leaves(params))
    assert counts.latent == 2 * 16 * 8 and work.latent == 2 * counts.latent
    assert counts.experts == 8 * 3 * 8 * 16 and counts.experts_active == 2 * 3 * 8 * 16
    assert work.experts == 2 * counts.experts_active
    plain = tiny.build(changes={"model.repeats": 1, **TOP_K}).model
    assert flops.parameters(plain).latent == flops.forward_per_token(plain, 8).latent == 0


# Surgery, and refusals.


def test_copied_experts_keep_the_function(tmp_path):
    changes = LATENT | {"model.repeats": 2, "model.moe.num_experts": 4, "model.dropout": 0.0}
    jax.config.update("jax_enable_x64", True)
    try:
        old = snapshot.read(open_run(surgery_cases.write(tmp_path / "run", changes)))
        done = operated(old, operations.split(There(2, 4, None), 2, "copies"), Asked(0.0, 0, 1.0))
        with jax.set_mesh(meshes.make(1, 1, 1)):
            before = snapshot.weights(old, old.arrays)
            found = gaps(before, [snapshot.weights(done.snapshot, done.exact)])[0][0]
    finally:
        jax.config.update("jax_enable_x64", False)
    assert not done.reasons and found <= 1e-12


def test_upcycling_refuses_another_width():
    dense = {"model.period": ("dense",), "model.repeats": 1}
    old = SimpleNamespace(raw=tiny.raw(dense), config=tiny.build(changes=dense), trains_on=False)
    asked = SimpleNamespace(words=("--config.model.moe.latent_dim=8",), restart=True)
    with pytest.raises(UserError) as error:
        new_raw(old, [0], asked)
    said = "model.moe.latent_dim = 8: experts of another width than the model's"
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_the_axis_that_splits_the_width_must_divide_it():
    with pytest.raises(UserError) as error:
        tiny.build((4, 1, 1), {"model.moe.latent_dim": 6})
    assert str(error.value) == "model.moe.latent_dim (6) must be divisible by mesh.data (4)"
