"""What the mesh may not change: first parameters, 100 steps in float64, balance losses under
accumulation; and where arrays lie.
"""

import re

import jax
import meshes
import numpy as np
import pytest
import tiny

from moe_jax.checkpoint import flat
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.parallel.mesh import P

# Two MoE layers whose capacity drops tokens, all statistics in the loss, dropout on: whatever
# depends on the mesh would show.
HARD = {
    "model.moe.dispatcher": "capacity",
    "model.moe.dispatchers.capacity.factor": 1.0,
    "model.dropout": 0.1,
    "model.moe.losses.balance": 0.1,
    "optim.learning_rate": 1e-2,
    "optim.warmup_steps": 5,
}
STEPS = 100


def flat_params(now):
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_flatten_with_path(now.params)[0]
    }


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        return tiny.Program((1, 1, 1), HARD).run(STEPS)


def deviations(one_device, program):
    """Worst deviation of (loss, parameters) over the same steps; routing and drops must be
    identical.
    """
    (want, want_rows), (now, rows) = one_device, program.run(STEPS)
    for step, (have, expected) in enumerate(zip(rows, want_rows, strict=True)):
        np.testing.assert_array_equal(
            have["moe"]["counts"],
            expected["moe"]["counts"],
            err_msg=f"routing flips at step {step}",
        )
        np.testing.assert_array_equal(
            have["moe"]["drop_fraction"], expected["moe"]["drop_fraction"]
        )
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, want_rows, strict=True))
    have = flat.unstack(flat.flatten(now.params), program.cfg.model.scan)
    expected = flat.flatten(want.params)
    return loss, max(
        np.abs(np.asarray(have[name]) - np.asarray(expected[name])).max() for name in expected
    )


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((2, 2, 2), {"train.micro_batch_size": 8, "model.scan": True, "model.remat": "full"}),
        pytest.param((2, 4, 1), {}, marks=pytest.mark.full),
    ],
    ids=["2x2x2 accumulated, scanned, rematerialised", "2x4x1"],
)
def test_a_hundred_steps_are_the_same_on_every_mesh(float64, one_device, shape, changes):
    loss, params = deviations(one_device, tiny.Program(shape, HARD | changes))
    assert loss < 1e-10 and params < 1e-8


def test_first_parameters_do_not_depend_on_the_mesh():
    """To the last bit or two: compilers fuse the draw differently."""
    changes = {"model.param_dtype": "float32", "model.dtype": "float32"}
    want = flat_params(tiny.Program((1, 1, 1), changes).run(0)[0])
    for shape in ((8, 1, 1), (2, 2, 2)):
        got = flat_params(tiny.Program(shape, changes).run(0)[0])
        for name, value in got.items():
            np.testing.assert_allclose(value, want[name], atol=2e-7, rtol=2e-7, err_msg=name)


def test_parameters_and_moments_are_sharded(float64):
    program = tiny.Program((2, 2, 2))
    now = program.run(0)[0]
    block = now.params["repeats"][0]["blocks"][0]
    want = {
        "q": (block["attention"]["weights"]["q"], P(mesh.FSDP, "model", None)),
        "o": (block["attention"]["weights"]["o"], P("model", None, mesh.FSDP)),
        "w_in": (block["moe"]["experts"]["w_in"], P(("expert", "seq"), "data", None, "model")),
        "w_out": (block["moe"]["experts"]["w_out"], P(("expert", "seq"), "model", "data")),
        "gate": (block["moe"]["router"]["gate"], P(mesh.FSDP, None)),
        "embed": (now.params["ends"]["embed"], P("model", mesh.FSDP)),
        "head": (now.params["ends"]["head"], P(mesh.FSDP, "model")),
    }
    for name, (array, place) in want.items():
        assert array.sharding.spec == place, name
    shapes = {x.shape: x.sharding.spec for x in jax.tree.leaves(now.params)}
    moments = [x for x in jax.tree.leaves(now.opt_state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(now.params))
    assert all(m.sharding.spec == shapes[m.shape] for m in moments)


@pytest.mark.parametrize(
    ("shape", "dispatcher"),
    [((1, 8, 1), "capacity"), ((1, 8, 1), "dropless"), ((1, 1, 1), "capacity")],
)
def test_expected_collectives(float64, shape, dispatcher):
    """Capacity dispatch is an all-to-all over `expert`, there and back, forward and backward;
    dropless has none of those but gathers and scatters; on one device no collective has a second
    member.
    """
    changes = {"model.moe.dispatcher": dispatcher, "model.repeats": 1}
    program = tiny.Program(shape, changes)
    with jax.set_mesh(program.mesh):
        first = jax.eval_shape(program.init, jax.random.key(0))
        batch = tiny.put(program.cfg, tiny.batch(program.cfg))
        text = program.step.lower(first, batch).compile().as_text()
    found = re.findall(
        r" (all-to-all|all-gather|all-reduce|reduce-scatter)(?:-start)?"
        r"\(.*?replica_groups=(\S+?),? ",
        text,
    )
    names = {name for name, groups in found if groups not in ("{{0}}", "[1,1]<=[1]")}
    if shape == (1, 1, 1):
        assert not names
    else:
        assert ("all-to-all" in names) == (dispatcher == "capacity")
        assert ("all-gather" in names and "reduce-scatter" in names) or dispatcher == "capacity"


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1)], ids=meshes.name)
def test_a_device_may_have_one_row_of_a_micro_batch(float64, shape):
    """Traced alone: the split into micro-batches must leave the rows where they are."""
    program = tiny.Program(shape, {"train.micro_batch_size": 8})
    with jax.set_mesh(program.mesh):
        first = jax.eval_shape(program.init, jax.random.key(0))
        after, _ = jax.eval_shape(
            program.step, first, tiny.put(program.cfg, tiny.batch(program.cfg))
        )
    assert jax.tree.structure(after) == jax.tree.structure(first)


def test_one_table_refuses_a_collision():
    with pytest.raises(ValueError, match="put one mesh axis twice"):
        mesh.spec("experts", "embed")


def test_every_factorisation_is_there():
    assert len(meshes.ALL) == 10


def test_stages_and_parts_of_rows_are_written_with_all_five_axes():
    lengths = mesh.parse("2x1x4x2x1", "--mesh")
    assert lengths == mesh.Lengths(stage=2, expert=4, seq=2) and str(lengths) == "2x1x4x2x1"
    assert lengths.batch_devices == 4 and lengths.split() == "stage 2 x expert 4 x seq 2"
    assert str(mesh.nearest(lengths, 8)) == "2x1x2x2x1"
    assert mesh.resolve(lengths._replace(data=-1), 32) == lengths._replace(data=2)
    with pytest.raises(UserError, match=r"mesh.stage 2 x mesh.data 1 x mesh.expert 4 x mesh.seq 2"):
        mesh.resolve(lengths, 8)


def test_lengths_are_written_and_parsed_in_one_form():
    lengths = mesh.parse("2x1x4", "--mesh")
    assert lengths == mesh.Lengths(data=2, model=4) and str(lengths) == f"{lengths}" == "2x1x4"
    assert lengths.num_devices == 8 and lengths.batch_devices == 2
    assert lengths.split() == "data 2 x model 4" and mesh.ONE.split() == ""
    assert lengths.written() == {"stage": 1, "data": 2, "expert": 1, "seq": 1, "model": 4}
    assert mesh.of(meshes.make(2, 1, 4)) == lengths
