"""Instruments on a model's routing: what is recorded, replayed, knocked out and compared, against
hand-made values.
"""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
from instrument_cases import DATA, probed, recorded, seen, weights, with_

from moe_jax.errors import UserError
from moe_jax.instruments import held_out, interference, precision, record, replay
from moe_jax.moe import probe
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.routing.contract import Routing, Slots, Tokens
from moe_jax.schema.steps import due
from moe_jax.tasks.lm import task as lm
from moe_jax.train_step import State, make_loss, make_model


def first_state(run):
    return State(jnp.int32(0), run.params, run.router_state, {}, None, jnp.int32(0))


@pytest.fixture
def run(float64):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        yield probed()


# Record


def test_files_are_the_same_on_every_mesh_with_accumulation(float64, tmp_path):
    changes = {
        "record.steps": "1",
        "train.micro_batch_size": 8,
        "model.moe.dispatcher": "capacity",
        "model.dropout": 0.1,
    }
    for shape in ((1, 1, 1), (2, 2, 2)):
        with jax.set_mesh(meshes.make(*shape)):
            run = probed(shape, changes | {"model.moe.dispatchers.capacity.factor": 0.75})
            write = record.make_recorder(
                run.cfg,
                make_model(run.cfg.model),
                run.dataset.domains,
                tmp_path / meshes.name(shape),
            )
            write(1, first_state(run), tiny.put(run.cfg, tiny.batch(run.cfg)))
            write(2, first_state(run), tiny.put(run.cfg, tiny.batch(run.cfg)))
    one, other = (tmp_path / name for name in ("1x1x1", "2x2x2"))
    assert sorted(p.name for p in one.iterdir()) == ["manifest.json", "step_00000001.npz"]
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    arrays = record.read_step(one, 1)
    assert {name: (z.dtype, z.shape) for name, z in arrays.items()} == {
        "expert": (np.uint8, (2, 16, 16, 2)),
        "gate": (np.float16, (2, 16, 16, 2)),
        "dropped": (bool, (2, 16, 16, 2)),
        "token": (np.uint8, (16, 16)),
        "segment": (np.uint8, (16, 16)),
        "domain": (np.uint8, (16, 16)),
    }
    nowhere = (arrays["expert"] == 4).all(-1)
    np.testing.assert_array_equal(nowhere, np.broadcast_to(arrays["segment"] == 0, nowhere.shape))
    kept = (arrays["expert"][0, 0, :, :, None] == np.arange(4)) & ~arrays["dropped"][
        0, 0, :, :, None
    ]
    assert (
        kept.sum((0, 1)).max() == 6 and arrays["dropped"].any()
    )  # ceil(0.75 * 2 choices * 16 tokens / 4 experts) places
    manifest = json.loads((one / "manifest.json").read_text())
    assert manifest["blocks"] == [0, 1] and manifest["num_experts"] == 4
    assert manifest["files"]["step_00000001.npz"]["arrays"]["expert"] == ["uint8", [2, 16, 16, 2]]
    with pytest.raises(
        UserError,
        match=r"no routing of step 7 is recorded in .*1x1x1: it has \[1\] \(record.steps\)",
    ):
        record.read_step(one, 7)


def test_micro_batches_come_back_in_the_order_of_the_rows():
    from moe_jax.train_step import micro_batches

    rows = jnp.arange(24).reshape(12, 2)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        parts = micro_batches(rows, 3, 2)[:, None]  # one layer
    np.testing.assert_array_equal(record._rows_in_order(parts, 3, 2)[0], rows)


def test_which_steps():
    def chosen(text):
        return [step for step in range(1, 13) if due(text, "record.steps")(step)]

    assert chosen("") == [] and chosen("3, 11") == [3, 11] and chosen("1,every 5") == [1, 5, 10]
    for text in ("every", "0", "every 0", "1-3"):
        with pytest.raises(UserError, match=f'record.steps = "{text}".*write 100,200 or every 50'):
            due(text, "record.steps")


def test_what_cannot_be_recorded_is_refused(float64):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        with pytest.raises(UserError, match="no MoE layer"):
            probed(changes={"model.prefix": (), "model.period": ("dense",)})
        with pytest.raises(UserError, match='only some tokens go through a block "depth:moe"'):
            probed(changes={"model.prefix": ("depth:moe",), "model.allow_leak": True})


def test_a_router_without_a_fixed_number_of_choices_has_a_place_for_every_expert():
    """Two rows of one token, three experts, as expert choice lists them: token 0 by experts 2 and
    0, token 1 by expert 2; one void.
    """
    zero_T = jnp.zeros(2, jnp.int32)
    tokens = Tokens(jnp.zeros((2, 4)), zero_T, zero_T, zero_T, zero_T + 1, zero_T == 0, num_rows=2)
    token, expert, gate = (
        jnp.array([0, 1, 0, 1]),
        jnp.array([2, 2, 0, 3]),
        jnp.array([0.5, 0.25, 1.0, 9.0]),
    )
    routing = Routing(token, expert, gate, {}, per_token=0)
    fields = probe.record(routing, jnp.array([False, True, False, False]), tokens, probe.ROUTING, 3)
    np.testing.assert_array_equal(fields["record/expert"], [[[0, 3, 2]], [[3, 3, 2]]])
    np.testing.assert_array_equal(fields["record/gate"], [[[1, 0, 0.5]], [[0, 0, 0.25]]])
    np.testing.assert_array_equal(fields["record/dropped"], [[[False] * 3], [[False, False, True]]])
    with pytest.raises(UserError, match="makes no assignments that could be recorded"):
        probe.record(Slots(token, token, {}), token, tokens, probe.ROUTING, 3)
    with pytest.raises(UserError, match="null experts that copy the token"):
        probe.record(routing._replace(copy_T=zero_T), token, tokens, probe.ROUTING, 3)


def test_what_an_ordering_drops_is_recorded(float64):
    """Rounding sends assignments nowhere before a dispatcher sees them: the record has the expert,
    and that it was dropped.
    """
    rounding = {
        "model.moe.ordering": "rounding",
        "model.moe.orderings.rounding.tile": 4,
        "model.allow_leak": True,
    }
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes=rounding | {"model.repeats": 1})
        inputs, model = held_out.put_batch(run, run.batches[0]), make_model(run.cfg.model)
        seen = lm.model_batch(inputs, probe.ROUTING)

        def train(*weights):
            return model.bind(*weights)(seen, jax.random.key(0), True)[1]

        sums, fields = probe.split(jax.device_get(jax.jit(train)(run.params, run.router_state)))
    valid = run.batches[0].segment_BS > 0
    assert (fields["expert"][0][valid] < 4).all() and (fields["gate"][0][valid] > 0).all()
    assert fields["dropped"].any() and not fields["dropped"].all()
    np.testing.assert_array_equal(fields["dropped"].sum((2, 3)), sums["dropped"])


def test_layers_find_their_blocks(float64):
    cfg = tiny.build(
        changes={"model.prefix": ("dense", "moe"), "model.suffix": ("dense",), "model.repeats": 1}
    ).model
    blocks = held_out.of_all_blocks(cfg, np.arange(1, 7).reshape(2, 3))
    np.testing.assert_array_equal(blocks, [[0, 1, 4, 0], [0, 2, 5, 0], [0, 3, 6, 0]])


# Replay


def test_own_routing_replayed_is_the_same_loss_on_a_mesh(float64):
    with jax.set_mesh(meshes.make(2, 2, 2)):
        run = probed((2, 2, 2), num_batches=2)
        other = jax.tree.map(lambda x: x + 0.1, run.params)
        result = replay.evaluate(
            run, {5: (run.params, run.router_state), 7: (other, run.router_state)}, seed=1
        )
    for name in ("own", "frozen 5"):
        assert abs(result[name]["gap/loss"]) < 1e-12, name
    for name in ("shuffled", "balanced", "random", "frozen 7"):
        assert abs(result[name]["gap/bits_per_byte"]) > 1e-6, name


def test_own_routing_with_null_experts_has_the_capacity_of_the_real_ones(float64):
    """Half of the four choices are meant to be null: twice the factor of top-k's two would drop
    nothing here.
    """
    tight = {
        "model.moe.dispatcher": "capacity",
        "model.moe.dispatchers.capacity.factor": 0.75,
        "model.repeats": 1,
    }
    null = {"model.moe.router": "null", "model.moe.routers.null.num_null": 4}
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes=tight | null)
        assert recorded(run)["dropped"].any()
        assert abs(replay.evaluate(run, {}, seed=1)["own"]["gap/loss"]) < 1e-12


def loads(expert_LBSK):
    return (expert_LBSK.reshape(len(expert_LBSK), -1, 1) == np.arange(4)).sum(1)


def test_other_routings_keep_what_they_promise(run):
    own = seen(run)
    for name, way in replay.WAYS.items():
        expert, gate = way(own)
        chosen = expert[:, own.valid_BS]
        assert (chosen[..., 0] != chosen[..., 1]).all(), name
        np.testing.assert_allclose(gate[:, own.valid_BS].sum(-1), 1, err_msg=name)
        assert (expert[:, ~own.valid_BS] == 4).all(), name
    shuffled, gate = replay.shuffled(own)
    np.testing.assert_array_equal(loads(shuffled), loads(own.expert_LBSK))
    assert (shuffled != own.expert_LBSK).any() and abs(gate.sum() - own.gate_LBSK.sum()) < 1e-9
    most = -(-own.valid_BS.sum() * 2 // 4)
    assert (loads(replay.balanced(own)[0]) <= most).all() and loads(own.expert_LBSK).max() > most


def test_balanced_routing_is_the_best_of_all():
    """4 tokens, 3 experts, k = 2: at most ceil(8 / 3) = 3 tokens each; all 3^4 are tried."""
    probs_NE = np.random.default_rng(3).dirichlet(np.ones(3), 4)
    pairs = [(0, 1), (0, 2), (1, 2)]

    def score(chosen):
        return sum(probs_NE[n, list(pair)].sum() for n, pair in enumerate(chosen))

    def fits(chosen):
        return max(np.bincount(np.ravel(chosen), minlength=3)) <= 3

    best = max((c for c in itertools.product(pairs, repeat=4) if fits(c)), key=score)
    found = replay.best_balanced(probs_NE, 2)
    assert abs(score([tuple(pair) for pair in found]) - score(best)) < 1e-12
    taken = np.take_along_axis(probs_NE, found, 1)
    assert (taken[:, 0] >= taken[:, 1]).all()


def test_the_score_of_balanced_replay_is_the_routers_own(float64):
    """With the model's own experts the gates are the model's own."""
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes={"model.moe.router": "sigmoid"})
        fields = recorded(run, probe.INPUTS)
        probs = np.take_along_axis(
            replay._probabilities(run, fields["input"]), fields["expert"].clip(0, 3), -1
        )
    valid = run.batches[0].segment_BS > 0
    own = probs / probs.sum(-1, keepdims=True)
    np.testing.assert_allclose(fields["gate"][:, valid], own[:, valid], rtol=1e-6)


def language_gradient(run, model_cfg, inputs):
    loss = make_loss(dataclasses.replace(run.cfg, model=model_cfg), make_model(model_cfg))

    def nll(params):
        return loss(params, run.router_state, inputs, jax.random.key(0))[1][1]["nll"]

    return jax.jit(jax.grad(nll))(run.params)


@pytest.mark.full  # test_retrain.py takes such steps in every run
def test_a_training_step_takes_the_routing_it_is_given(run):
    """Own experts, gates by the router over them: the gradients of the language loss are those of
    the model itself.
    """
    fields = recorded(run)
    expert, gate = (
        held_out.of_all_blocks(run.cfg.model, fields[name]) for name in ("expert", "gate")
    )
    given = held_out.put_batch(run, run.batches[0], probe.Request((expert, gate)))
    plain = held_out.put_batch(run, run.batches[0])
    grads = [
        language_gradient(run, run.cfg.model, plain),
        language_gradient(run, replay.under(run.cfg.model, 2, "router"), given),
    ]
    for a, b in zip(jax.tree.leaves(grads[0]), jax.tree.leaves(grads[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    assert np.abs(held_out.router_weights(grads[0], run.cfg.model)["gate"]).max() > 1e-6


# Precision


def test_flips_and_margins_by_hand():
    before = np.array([[[[0, 1], [2, 3]]], [[[0, 1], [4, 4]]]])  # two layers; 4 = nowhere
    after = np.array([[[[1, 0], [3, 0]]], [[[2, 3], [0, 1]]]])
    np.testing.assert_array_equal(precision.flips(before, after, 4), [[1, 2], [4, 2]])
    scores = np.array([[[[0.5, 2.0, 1.25, -1.0]]]])
    np.testing.assert_array_equal(precision.margin(scores, 2), [[[0.75]]])
    assert np.isinf(precision.margin(scores, 4)).all()


def test_the_margin_is_of_the_scores_that_decide(float64):
    """Of a router with a bias the k largest scores are the experts that it took; with groups they
    need not be.
    """
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = probed(changes={"model.moe.router": "sigmoid", "model.repeats": 1})
        fields, valid = recorded(run, probe.INPUTS), run.batches[0].segment_BS > 0
        best = np.argsort(-precision.scores(run, fields["input"]), -1)[..., :2]
        np.testing.assert_array_equal(best[:, valid], fields["expert"][:, valid])
        logits = np.einsum("LBSD,LDE->LBSE", fields["input"], held_out.gates(run, "the test"))
        assert (np.argsort(-logits, -1)[..., :2][:, valid] != best[:, valid]).any()
        moe = run.cfg.model.moe
        grouped = {"router_options": dataclasses.replace(moe.router_options, num_groups=2)}
        relu = {"router": "relu", "router_options": ROUTERS["relu"].options(k=2, max_active=4)}
        for changes, message in (
            (grouped, "chooses groups of experts first"),
            (relu, "no fixed number of choices"),
        ):
            model = dataclasses.replace(run.cfg.model, moe=dataclasses.replace(moe, **changes))
            with pytest.raises(UserError, match=message):
                other = run._replace(cfg=dataclasses.replace(run.cfg, model=model))
                precision.scores(other, fields["input"])


def test_batch_composition_flips_nothing_and_bfloat16_does(run):
    def near(moe):
        return {
            "gate": moe["gate"][:, :1] + 1e-4 * moe["gate"]
        }  # logits closer than bfloat16 tells apart

    result = precision.measure(run._replace(params=with_(run, 0, near)))
    assert result["notes"] == {} and len(result["margins"]["0.5"]) == 2
    assert result["flips"]["order"] == [0, 0] and result["flips"]["size"] == [0, 0]
    assert result["flips"]["router"][0] > 0.2 > 0.05 > result["flips"]["router"][1]
    assert (
        len(result["flips"]["model"]) == 2
        and result["margins"]["0.9"][0] < 1e-3 < result["margins"]["0.9"][1]
    )


def test_the_rounded_router_is_the_router_when_nothing_is_rounded(run):
    """Weights and activations that bfloat16 holds, and logits too: small whole numbers."""
    rng = np.random.default_rng(0)
    run = run._replace(
        params=with_(run, 0, lambda moe: {"gate": rng.integers(-2, 3, moe["gate"].shape)})
    )
    inputs = rng.integers(-1, 2, (2, *run.batches[0].tokens_BS.shape, 16)).astype(float)
    expert = precision.rounded_router(run, inputs, run.batches[0])[0]
    logits = np.einsum("BSD,DE->BSE", inputs[0], held_out.gates(run, "the test")[0])
    valid = run.batches[0].segment_BS > 0
    np.testing.assert_array_equal(
        expert[valid], np.argsort(-logits, -1, kind="stable")[valid][:, :2]
    )


def test_halves_of_an_odd_batch_are_a_note(run):
    odd = run._replace(
        cfg=dataclasses.replace(run.cfg, eval=dataclasses.replace(run.cfg.eval, batch_size=5))
    )
    with pytest.raises(UserError, match=r"half of eval\.batch_size"):
        precision._in_halves(odd, None, run.batches[0])


# Interference


def metered(shape, changes):
    with jax.set_mesh(meshes.make(*shape)):
        cfg = tiny.build(shape, DATA | changes)
        model = make_model(cfg.model)
        now = State(jnp.int32(0), *weights(cfg), {}, None, jnp.int32(0))
        return (
            cfg,
            model,
            now,
            interference.make_meter(cfg, model)(now, tiny.put(cfg, tiny.batch(cfg))),
        )


@pytest.mark.full
def test_interference_is_that_of_the_gradients_and_the_same_under_accumulation_meshes_and_scan(
    float64,
):
    only = {"model.moe.losses.balance": 0.5, "model.moe.losses.z": 0.0, "model.scan": False}
    only |= {"model.prefix": ("moe",), "model.repeats": 1}
    cfg, model, now, values = metered((1, 1, 1), only)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        batch = tiny.put(cfg, tiny.batch(cfg))

        def parts(params):
            return make_loss(cfg, model)(params, now.router_state, batch, jax.random.key(9))[1][1]

        def loss(params, weight):
            return weight * parts(params)["nll"] + (1 - weight) * parts(params)["balance_loss"]

        gradient = jax.jit(jax.grad(loss))
        language, balance = gradient(now.params, 1.0), gradient(now.params, 0.0)
    g, a = (np.ravel(tree["prefix"][0]["moe"]["router"]["gate"]) for tree in (language, balance))
    assert (
        abs(
            values["interference/layer_0/router/auxiliary_cosine"]
            - g @ a / np.sqrt(g @ g * (a @ a))
        )
        < 1e-10
    )
    assert (
        abs(
            values["interference/layer_0/router/auxiliary_ratio"] / (0.5 * np.sqrt(a @ a / (g @ g)))
            - 1
        )
        < 1e-10
    )
    assert (
        values["interference/layer_1/experts/auxiliary_ratio"] == 0
    )  # the last experts do not change any router's input
    assert (
        values["interference/layer_0/experts/auxiliary_ratio"] > 0
        and "interference/outside/auxiliary_cosine" in values
    )
    _, _, _, other = metered((2, 2, 2), only | {"train.micro_batch_size": 8, "model.scan": True})
    assert values.keys() == other.keys()
    for name, value in values.items():
        assert abs(value - other[name]) < 1e-9, name


def test_no_auxiliary_loss_no_interference(float64):
    with pytest.raises(UserError, match=r"every coefficient of model\.moe\.losses is 0"):
        metered(
            (1, 1, 1),
            {"model.moe.losses.balance": 0.0, "model.moe.losses.z": 0.0, "model.repeats": 1},
        )
