"""Mixture of depths: who goes through a block, what it does to them, and that decoding, meshes and
layouts say the same.
"""

import dataclasses
import math

import flops_cases
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import sample_cases
import tiny
from flax import nnx

from moe_jax import evaluate
from moe_jax.checkpoint import flat
from moe_jax.errors import UserError
from moe_jax.models import depth
from moe_jax.models.block import NOTHING
from moe_jax.models.decodable import with_dispatcher
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches
from moe_jax.moe.layer import Batch
from moe_jax.parallel.mesh import FSDP, P
from moe_jax.plan import flops
from moe_jax.tasks import contract
from moe_jax.tasks.lm import task as lm

ONE = (1, 1, 1)
DEPTH = {"model.allow_leak": True, "model.depth.capacity": 0.375}


def numpy_batch(segment, seed=0):
    """(id, position, segment, row) of rows of packed documents."""
    segment = np.asarray(segment, np.int32)
    place = np.arange(segment.shape[1])
    position = np.stack([[s - np.flatnonzero(row == row[s])[0] for s in place] for row in segment])
    ids = np.random.default_rng(seed).integers(0, 64, segment.shape)
    return [z.astype(np.int32) for z in (ids, position, segment, np.arange(len(segment)))]


def put_batch(arrays):
    return Batch(*(meshes.put(z, "batch") for z in arrays))


# The choice.


def test_who_is_chosen_worked_by_hand():
    """Three of six: the second row's equals go by order, the third row has two tokens beside its
    padding, the fourth none.
    """
    logit = [
        [0.1, 3.0, -1.0, 2.0, 0.0, 1.0],
        [1, 1, 1, 1, 1, 2],
        [-5.0, 9.0, -6.0, 9.0, 9.0, 9.0],
        [1, 2, 3, 4, 5, 6],
    ]
    valid = np.ones((4, 6), bool)
    valid[2, [1, 3, 4, 5]] = valid[3] = False
    chosen = np.asarray(depth.choose(jnp.asarray(logit), jnp.asarray(valid), 3))
    assert [np.flatnonzero(row).tolist() for row in chosen] == [[1, 3, 5], [0, 1, 5], [0, 2], []]


def test_how_many_are_chosen():
    """0.1 x 30 is 3.0000000000000004 in floating point; a block that nobody goes through would be
    none.
    """
    cases = [(0.125, 256), (0.1, 30), (0.125, 9), (0.01, 8), (1.0, 7)]
    assert [depth.num_chosen(*case) for case in cases] == [32, 3, 2, 1, 7]


@pytest.mark.parametrize("train", [True, False], ids=["top", "causal"])
def test_chosen_tokens_make_a_row_of_their_own(float64, train):
    """Against the definition: each row's chosen tokens, by NumPy, run through the block as a
    shorter row without padding.
    """
    arrays = numpy_batch([[1, 1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 0, 0, 2, 2, 0]])
    x_BSD = np.random.default_rng(1).normal(size=(2, 8, 16))
    mesh, model, params = on_one_device(
        DEPTH | {"model.period": ("depth:moe",), "model.repeats": 1}
    )
    with jax.set_mesh(mesh):
        block = model.bind(params, {}).repeats[0].blocks[0]

        graph, variables = nnx.split(block)
        key = jax.random.key(1)

        @jax.jit
        def run(x, batch):
            return nnx.merge(graph, variables)(x, batch, key, train)

        @jax.jit
        def update(x, batch):
            attended, fed, _ = nnx.merge(graph, variables)._added(x, batch, key, train, NOTHING)
            return attended + fed

        got, sums = run(meshes.put(x_BSD, "batch"), put_batch(arrays))
        logit_BS = x_BSD @ np.asarray(block.depth["router"])
        want, num = x_BSD.copy(), []
        for row in range(2):
            real = np.flatnonzero(arrays[2][row])
            top = sorted(real[np.argsort(-logit_BS[row, real])][:3])
            index = np.array(top) if train else real[logit_BS[row, real] > 0]
            num.append((len(index), len(set(top) & set(real[logit_BS[row, real] > 0]))))
            part = [z[row : row + 1, index] for z in arrays[:3]] + [arrays[3][row : row + 1]]
            y = update(meshes.put(x_BSD[row : row + 1, index], "batch"), put_batch(part))
            want[row, index] += logit_BS[row, index][:, None] * np.asarray(y)[0]
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert [n for n, _ in num] == np.asarray(
        sums["depth/top" if train else "depth/causal"]
    ).tolist()
    valid = np.asarray(sums["depth/tokens"])
    assert valid.tolist() == [8, 5]
    agree = (
        valid
        - np.asarray(sums["depth/top"])
        - np.asarray(sums["depth/causal"])
        + 2 * np.array([n for _, n in num])
    )
    assert np.asarray(sums["depth/agree"]).tolist() == agree.tolist()
    np.testing.assert_array_equal(np.asarray(sums["counts"]).sum(1), [2 * n for n, _ in num])


# The model.


def drawn(cfg):
    """Parameters drawn by NumPy on the current mesh: compiling the model's own draw takes longer
    than the tests.
    """
    return jax.tree.map(lambda x: x.astype(cfg.param_dtype), sample_cases.values(cfg)[0])


def on_one_device(changes):
    """(mesh, model, parameters)."""
    cfg, mesh = tiny.build(ONE, changes).model, meshes.make(*ONE)
    with jax.set_mesh(mesh):
        return mesh, make_model(cfg), drawn(cfg)


def logits_of(model, params, train):
    """Jitted: numpy arrays of a batch -> logits."""
    apply = jax.jit(
        lambda params, batch: model.bind(params, {})(batch, jax.random.key(0), train)[0]
    )
    return lambda arrays: np.asarray(apply(params, put_batch(arrays)))


def test_all_tokens_with_weight_one_are_the_plain_block(float64):
    """The router reads an embedding column that is the same for all tokens, so that r = 1; capacity
    1 takes all, and so does r > 0.
    """
    arrays = numpy_batch([[1, 1, 1, 2, 2, 2, 2, 0]])
    one = {"model.repeats": 1, "model.depth.capacity": 1.0}
    mesh, model, params = on_one_device(one | {"model.period": ("depth:dense",)})
    embed = np.array(params["ends"]["embed"])
    embed[:, 0] = 1.0

    def like(x, value):
        return jax.device_put(value, x.sharding)

    block = params["repeats"][0]["blocks"][0]
    params["ends"]["embed"] = like(params["ends"]["embed"], embed)
    block["depth"]["router"] = like(
        block["depth"]["router"], np.eye(16)[0] / 4
    )  # x = embed sqrt(16)
    with jax.set_mesh(mesh):
        top, causal = (logits_of(model, params, train)(arrays) for train in (True, False))
        del block["depth"]  # what is left are the parameters of a plain block
        plain = make_model(tiny.build(ONE, one | {"model.period": ("dense",)}).model)
        want = logits_of(plain, params, False)(arrays)
    np.testing.assert_allclose(top[:, :7], want[:, :7], atol=1e-12)
    np.testing.assert_allclose(causal[:, :7], want[:, :7], atol=1e-12)


def test_evaluation_does_not_see_the_future_nor_other_documents_and_training_does(float64):
    """By the causal rule a document says the same packed behind another as alone, and no token
    hears a later one; by the top C it does.
    """
    packed = numpy_batch([[1, 1, 1, 2, 2, 2, 2, 2]] * 2)
    packed[0][1] = packed[0][0]
    other, alone = ([z.copy() for z in packed] for _ in range(2))
    other[0][0, :3] = (other[0][0, :3] + 7) % 64  # another first document
    other[0][1, -1] = (other[0][1, -1] + 7) % 64  # another last token
    alone[0] = np.roll(alone[0], -3, 1)
    alone[2][:] = [1, 1, 1, 1, 1, 0, 0, 0]
    alone[1][:] = np.arange(8)
    mesh, model, params = on_one_device(DEPTH | {"model.period": ("depth:dense",)})
    with jax.set_mesh(mesh):
        run, trained = (logits_of(model, params, train) for train in (False, True))
        want, changed, single = run(packed), run(other), run(alone)
        pairs = [(numpy_batch([[1] * 8] * 2, seed), later(seed)) for seed in range(3)]
        leak = [np.abs(trained(now) - trained(then))[:, :-1].max() for now, then in pairs]
    np.testing.assert_allclose(want[0, 3:], changed[0, 3:], atol=1e-12)
    np.testing.assert_allclose(want[1, :-1], changed[1, :-1], atol=1e-12)
    np.testing.assert_allclose(want[:, 3:], single[:, :5], atol=1e-12)
    assert np.abs(want[0, :3] - changed[0, :3]).max() > 1e-3
    assert max(leak) > 1e-3


def later(seed):
    arrays = numpy_batch([[1] * 8] * 2, seed)
    arrays[0][0, -1] = (arrays[0][0, -1] + 7) % 64
    return arrays


def test_both_losses_reach_the_router_and_the_causal_one_nothing_else(float64):
    changes = DEPTH | {"model.period": ("depth:dense",), "model.repeats": 1}
    mesh, model, params = on_one_device(changes)
    with jax.set_mesh(mesh):
        cfg = tiny.build(ONE, changes)
        batch = tiny.put(cfg, tiny.batch(cfg))

        @jax.jit
        def grads(params):
            def losses(params):
                totals = contract.forward(lm.TASK, model.bind(params, {}), batch, jax.random.key(0))
                return totals["nll"] / totals["tokens"], depth.penalty(totals["depth"])

            return jax.jacrev(losses)(params)

        of_nll, of_penalty = grads(params)

    def path(tree):
        return np.asarray(tree["repeats"][0]["blocks"][0]["depth"]["router"])

    assert np.abs(path(of_nll)).max() > 1e-4 and np.abs(path(of_penalty)).max() > 1e-4
    rest = {
        name: x for name, x in flat.flatten(of_penalty).items() if not name.endswith("depth/router")
    }
    assert len(rest) > 8 and all((np.asarray(x) == 0).all() for x in rest.values())


# Training, on meshes.

TRAINED = DEPTH | {
    "model.period": ("depth:dense",),
    "model.suffix": ("depth:moe",),
    "model.dropout": 0.1,
    "model.moe.dispatcher": "capacity",
    "model.moe.dispatchers.capacity.factor": 1.0,
    "model.depth.loss": 1.0,
    "optim.learning_rate": 1e-2,
    "optim.warmup_steps": 2,
}


def begin(program):
    """The state of a program at step 0, with drawn parameters."""
    with jax.set_mesh(program.mesh):
        abstract = jax.eval_shape(program.init, jax.random.key(0))

        def place(x):
            return jax.NamedSharding(program.mesh, x.sharding.spec if x.sharding else P())

        zero = jax.tree.map(
            lambda x: jax.device_put(np.zeros(x.shape, x.dtype), place(x)), abstract
        )
        return zero._replace(params=drawn(program.cfg.model))


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        return tiny.Program(ONE, TRAINED)


@pytest.mark.usefixtures("standard_promotion")
def test_training_is_the_same_on_every_mesh_accumulated_and_scanned(float64, one_device):
    """20 steps in float64: losses to 1e-10, parameters to 1e-8, and who goes through which block
    exactly.
    """
    want, expected = one_device.run(20, begin(one_device))
    program = tiny.Program((2, 2, 2), TRAINED | {"train.micro_batch_size": 8, "model.scan": True})
    now, rows = program.run(20, begin(program))
    for step, (have, row) in enumerate(zip(rows, expected, strict=True)):
        assert abs(have["loss"] - row["loss"]) < 1e-10, step
        np.testing.assert_array_equal(have["moe"]["counts"], row["moe"]["counts"])
        for name in ("depth_top", "depth_causal", "depth_agreement"):
            np.testing.assert_allclose(have[name], row[name], rtol=1e-14, err_msg=name)
    have, wanted = flat.unstack(flat.flatten(now.params), True), flat.flatten(want.params)
    assert have.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(have[name], value, atol=1e-8, err_msg=name)
    router = now.params["repeats"]["blocks"][0]["depth"]["router"]
    assert router.sharding.spec == P(None, FSDP) and router.shape == (2, 16)
    assert expected[0]["moe"]["counts"].shape == (
        1,
        8,
    )  # of the suffix; the depth figures are of all three blocks


@pytest.mark.usefixtures("standard_promotion")
def test_training_learns_a_batch_and_the_causal_rule(float64, one_device):
    """The same batch 60 times; in evaluation the losses are those of the causal rule."""
    program = one_device
    with jax.set_mesh(program.mesh):
        now, rows = begin(program), []
        fixed = tiny.put(program.cfg, tiny.batch(program.cfg))
        for _ in range(60):
            now, metrics = program.step(now, fixed)
            rows.append(jax.device_get(metrics))
        model = program.model.bind(now.params, now.router_state)
        total = jax.jit(lambda batch: contract.evaluate(lm.TASK, model, batch, tiny.DATA))(fixed)
    result = evaluate.summary(lm.TASK, jax.tree.map(np.asarray, total), tiny.DATA)
    assert rows[-1]["nll"] < rows[0]["nll"] - 1
    assert rows[-1]["depth_loss"] < rows[0]["depth_loss"] - 0.1
    assert rows[0]["depth_top"] == pytest.approx(
        3 / 8, rel=0.1
    )  # of the valid tokens; some rows have padding
    assert result["loss"] < rows[0]["nll"] - 1 and result["depth_agreement"] > 0.7
    assert result["depth_top"] == pytest.approx(float(rows[0]["depth_top"]), rel=1e-12)
    assert result["routing"].shape == (1, 1, 8)


def test_the_router_is_wide():
    """With bfloat16 parameters too; and one that no gradient reached would be no parameter."""
    changes = {
        "model.param_dtype": "bfloat16",
        "model.dtype": "bfloat16",
        "model.period": ("depth:dense",),
    }
    cfg = tiny.build(ONE, DEPTH | changes)
    with jax.set_mesh(meshes.make(*ONE)):
        params, _ = jax.eval_shape(make_model(cfg.model).init, jax.random.key(0))
    block = params["repeats"][0]["blocks"][0]
    assert (
        block["depth"]["router"].dtype == jnp.float32
        and block["attention"]["weights"]["q"].dtype == jnp.bfloat16
    )


# Decoding.


def test_cached_logits_equal_uncached_logits(float64):
    """Rows padded on the right in two pieces and then one token at a time; then again from the
    start, over what the caches still hold.
    """
    length, length_B = 16, np.array([5, 16, 12, 9])
    depths = {
        "prefix": ("depth:dense",),
        "period": ("depth:moe",),
        "repeats": 1,
        "allow_leak": True,
    }
    cfg = sample_cases.model_config(**depths, dtype="float64", param_dtype="float64")
    cfg = dataclasses.replace(with_dispatcher(cfg, "dropless"), scan=False)
    pieces = [(0, 9), *((i, i + 1) for i in range(9, 13))]
    with jax.set_mesh(sample_cases.one_device()):
        model, weights = make_model(cfg), sample_cases.values(cfg)
        weights = jax.tree.map(lambda x: x.astype(jnp.float64), weights)
        bound = model.bind(*weights)

        @jax.jit
        def cached(caches, id_BS, place_S):
            valid_BS = place_S[None] < length_B[:, None]
            parts = (
                id_BS,
                jnp.where(valid_BS, place_S[None], length),
                valid_BS.astype(jnp.int32),
                jnp.arange(4),
            )
            return bound.cached(
                Batch(*(jax.sharding.reshard(z, P(("data", "expert"))) for z in parts)), caches
            )

        caches = empty_caches(cfg, 4, length)
        uncached = jax.jit(lambda batch: bound(batch, jax.random.key(0), False))
        for seed in range(2):
            arrays = numpy_batch(
                (np.arange(length)[None] < length_B[:, None]).astype(np.int32), seed
            )
            full, sums = uncached(put_batch(arrays))
            assert (
                (0 < sums["depth/causal"]) & (sums["depth/causal"] < sums["depth/tokens"])
            ).all()
            for first, last in pieces:
                got, caches = cached(caches, arrays[0][:, first:last], np.arange(first, last))
                real = np.arange(first, last)[None] < length_B[:, None]
                np.testing.assert_allclose(
                    np.asarray(got)[real], np.asarray(full)[:, first:last][real], atol=1e-9
                )


# The config.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"depth blocks \(model.depth.capacity = 0.125\) train on the tokens that score "
            r"highest.*or set model.allow_leak=True",
        ),
        (
            {"model.allow_leak": True, "model.depth.capacity": 0.0},
            r"model.depth.capacity = 0.0 must be above 0 and at most 1",
        ),
        (
            {"model.allow_leak": True, "model.depth.loss": -1.0},
            r"model.depth.loss = -1.0 must be at least 0",
        ),
        (
            {"model.suffix": ("depth:deep",)},
            'model.suffix = "depth:deep" is not known: choose one of dense, moe, depth:dense',
        ),
    ],
)
def test_refused(changes, message):
    with pytest.raises(UserError, match=message):
        tiny.build(ONE, {"model.period": ("moe", "depth:moe")} | changes)


def test_capacity_one_leaks_nothing_and_is_not_refused():
    assert (
        tiny.build(
            ONE, {"model.period": ("depth:moe",), "model.depth.capacity": 1.0}
        ).model.num_depth_blocks
        == 2
    )


# Counts.

PATTERN = {
    "prefix": ("depth:dense", "dense"),
    "period": ("moe", "depth:moe"),
    "repeats": 2,
    "allow_leak": True,
    "depth": {"capacity": 0.25, "loss": 0.0},
}


def test_parameters_are_those_of_the_model():
    cfg = flops_cases.make_config(model=PATTERN, moe={"shared_experts": 1}).model
    counts, want = flops.parameters(cfg), flops_cases.counted(cfg)
    for kind in set(counts._fields) - {"experts_active"}:
        assert getattr(counts, kind) == want[kind], kind
    assert counts.total == want.total()


def test_a_depth_block_costs_its_share():
    """Of 8 tokens 2 go through: a quarter of the products, and 2 x 3 / 2 pairs of tokens instead of
    8 x 9 / 2; the router reads all 8.
    """

    def block(kind):
        return flops.forward_per_token(
            flops_cases.make_config(model=PATTERN | {"prefix": (kind,), "repeats": 0}).model, 8
        )

    for kind in ("dense", "moe"):
        plain, part = block(kind), block(f"depth:{kind}")
        assert (part.attention_projections, part.dense, part.experts) == (
            plain.attention_projections / 4, plain.dense / 4, plain.experts / 4,
        )  # fmt: skip
        assert part.attention_scores * 36 == plain.attention_scores * 3
        assert part.router == plain.router / 4 + 2 * 32 and part.head == plain.head
    assert math.isclose(plain.attention_scores, 2 * 4 * 8 * 9)
