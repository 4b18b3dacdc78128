"""Schedules by hand-worked values; every optimizer learns, shards like its parameters and treats a
stack by layers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from moe_jax import optim
from moe_jax.config import build
from moe_jax.errors import UserError
from moe_jax.names import name_of
from moe_jax.optim import OPTIMIZERS, SCHEDULES, orthogonal, schedules
from moe_jax.schema.training import OptimConfig

OPTIONS = {
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0},
    "lion": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0},
    "adafactor": {"decay_rate": 0.8, "weight_decay": 0.0},
    "muon": {"beta": 0.95, "ns_steps": 5, "weight_decay": 0.0, "adam_learning_rate": 1.0},
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
}
RATES = {"adamw": 0.05, "lion": 0.06, "adafactor": 0.1, "muon": 0.3, "sgd": 0.02}

CONFIG = OptimConfig(
    optimizer="adamw",
    options=OPTIMIZERS["adamw"].options(**OPTIONS["adamw"]),
    learning_rate=1.0,
    schedule="constant",
    schedule_options=SCHEDULES["constant"].options(),
    warmup_steps=0,
    steps=100,
    clip_norm=0.0,
    decay_mask="matrices",
    train_only="",
    master_copy=False,
    ema_decay=0.0,
)


def config(optimizer="adamw", options=None, schedule="constant", schedule_options=None, **changes):
    """A config with options given as dicts; an optimizer's that are not given are OPTIONS."""
    options = OPTIMIZERS[optimizer].options(**{**OPTIONS[optimizer], **(options or {})})
    factors = SCHEDULES[schedule].options(**(schedule_options or {}))
    chosen = {"optimizer": optimizer, "options": options}
    chosen |= {"schedule": schedule, "schedule_options": factors}
    return dataclasses.replace(CONFIG, **chosen, **changes)


def normal(seed, shape, spec=()):
    sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(*spec)) if spec else None
    value = np.random.RandomState(seed).normal(size=shape).astype(np.float32)
    return jax.device_put(value, sharding)


def model(num_layers=2):
    """One parameter of every kind; 128 columns so that Adafactor factors.

    Layers are stacked, as scan has them.
    """
    L = num_layers
    return {
        "embed": normal(1, (128, 128), ("model", "data")),
        "layers": {
            "repeats": {
                "norm": {"scale": normal(2, (L, 8), (None, None))},
                "attention": {
                    "q": normal(3, (L, 8, 2, 4), (None, "data", "model", None)),
                    "o": normal(4, (L, 2, 4, 8), (None, "model", None, "data")),
                    "q_bias": normal(5, (L, 2, 4), (None, "model", None)),
                },
                "experts": {
                    "w_in": normal(6, (L, 2, 8, 2, 16), (None, None, "data", None, "model")),
                    "w_out": normal(7, (L, 2, 128, 128), (None, None, "model", "data")),
                },
                "router": {"gate": normal(8, (L, 8, 2), (None, "data", None))},
            }
        },
    }


def unstack(tree, num_layers=2):
    """repeats/x -> repeats/0/x, repeats/1/x, as a model that loops over its layers has them."""
    repeats = tree["layers"]["repeats"]
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], repeats) for i in range(num_layers)}
    return {**tree, "layers": {"repeats": layers}}


@pytest.fixture
def mesh():
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4])):
        yield


def rates(cfg, *steps):
    return [float(optim.rate(cfg)(step)) for step in steps]


def test_warm_up_starts_at_zero_and_is_linear():
    cfg = config(learning_rate=0.4, warmup_steps=4)
    assert rates(cfg, 0, 1, 2, 3, 4, 5) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_cosine():
    # warm-up 20 of 100: t = 1/4 at step 40, and 0.1 + 0.9 (1 + cos(pi/4)) / 2 = 0.1 + 0.45 * 1.7071
    # = 0.8682
    cfg = config(schedule="cosine", schedule_options={"final_fraction": 0.1}, warmup_steps=20)
    assert rates(cfg, 10, 20, 40, 60, 100, 1000) == pytest.approx(
        [0.5, 1.0, 0.868198, 0.55, 0.1, 0.1], abs=1e-6
    )


def test_linear():
    # t = 1/2 at step 60: 1 - 0.8 / 2 = 0.6
    cfg = config(schedule="linear", schedule_options={"final_fraction": 0.2}, warmup_steps=20)
    assert rates(cfg, 20, 60, 100, 101) == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(("shape", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_warmup_stable_decay(shape, middle):
    # the last 20 of 100 steps decay: u = 1/2 at step 90
    options = {"decay_fraction": 0.2, "final_fraction": 0.0, "shape": shape}
    cfg = config(schedule="wsd", schedule_options=options, warmup_steps=10)
    assert rates(cfg, 5, 10, 50, 80, 90, 100) == pytest.approx(
        [0.5, 1.0, 1.0, 1.0, middle, 0.0], abs=1e-6
    )


WSD = {
    "schedule": "wsd",
    "schedule_options": {"decay_fraction": 0.5, "final_fraction": 0.0, "shape": "linear"},
}


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({"warmup_steps": 100}, 100),
        ({"warmup_steps": 101}, 50),
        ({"warmup_steps": 20, "steps": 4}, 2),
        ({"warmup_steps": 20, "steps": 1}, 0),
        ({"warmup_steps": 50} | WSD, 50),
        ({"warmup_steps": 51} | WSD, 25),
    ],
)
def test_a_warm_up_that_does_not_fit_takes_half_of_the_room(changes, takes):
    cfg = config(**changes)
    assert schedules.warmup(cfg) == takes
    assert rates(cfg, takes) == [1.0] and (takes == 0 or rates(cfg, 0) == [0.0])
    said = schedules.warmup_note(cfg)
    assert (f"the warm-up takes {takes}" in said) == (takes < changes["warmup_steps"]) == bool(said)


def test_rate_follows_the_count_of_updates():
    tx = optim.make(
        config(optimizer="sgd", options={"momentum": 0.0, "nesterov": False}, warmup_steps=2),
        {"w": 0 * jnp.ones(1)},
        stacked=False,
    )
    params, state, moves = {"w": jnp.zeros(1)}, tx.init({"w": jnp.zeros(1)}), []
    for _ in range(4):
        updates, state = tx.update({"w": jnp.ones(1)}, state, params)
        moves.append(float(updates["w"][0]))
    assert moves == pytest.approx([0.0, -0.5, -1.0, -1.0])
    assert int(state["rate"].count) == 4


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_minimises_a_quadratic(name):
    """|w - target|^2 over a matrix and a vector; the rate falls to zero, because Lion circles at a
    constant one.
    """
    given = {"learning_rate": RATES[name], "steps": 300, "warmup_steps": 5}
    cfg = config(name, OPTIONS[name], "linear", {"final_fraction": 0.0}, **given)
    target = {"w_out": normal(1, (6, 4)), "bias": normal(2, (4,))}
    params = {"w_out": normal(3, (6, 4)), "bias": normal(4, (4,))}
    tx = optim.make(cfg, params, stacked=False)

    def loss(params):
        return sum(
            jnp.sum(jnp.square(p - t))
            for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target))
        )

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (last, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 300))(params)
    assert loss(last) < 1e-3 * loss(params)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_moments_are_sharded_like_their_parameters(name, mesh):
    params = model()
    tx = optim.make(
        config(optimizer=name, options=OPTIONS[name], clip_norm=1.0), params, stacked=True
    )
    state = jax.jit(tx.init)(params)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, after = jax.jit(tx.update)(gradients, state, params)
    assert jax.tree.map(lambda x: x.sharding, updates) == jax.tree.map(lambda x: x.sharding, params)
    # a step changes no sharding: the second step must not compile again
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), after, state)
    assert all(jax.tree.leaves(same))
    by_name = {name_of(path): p for path, p in jax.tree_util.tree_leaves_with_path(params)}
    matched = 0
    for path, moment in jax.tree_util.tree_leaves_with_path(state):
        for key, param in by_name.items():
            if key in name_of(path) and moment.shape == param.shape:
                assert moment.sharding == param.sharding, (name, key)
                matched += 1
    assert matched == {"adamw": 16, "lion": 8, "adafactor": 6, "muon": 12, "sgd": 8}[name]


def test_adafactor_factors_every_layer_by_itself(mesh):
    params = model()
    state = jax.jit(
        optim.make(
            config(optimizer="adafactor", options=OPTIONS["adafactor"]), params, stacked=True
        ).init
    )(params)
    factored = state["direction"]["layers"]["repeats"]["experts"]["w_out"][0]
    assert (factored.v_row.shape, factored.v_col.shape, factored.v.shape) == (
        (2, 2, 128),
        (2, 2, 128),
        (2, 1),
    )
    specs = {factored.v_row.sharding.spec, factored.v_col.sharding.spec}
    assert specs == {jax.P(None, None, "model"), jax.P(None, None, "data")}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_stack_of_layers_trains_like_the_layers_alone(name):
    repeats = {
        "norm": {"scale": normal(1, (2, 8))},
        "q": normal(2, (2, 8, 2, 4)),
        "w_out": normal(3, (2, 2, 128, 128)),
    }
    stack = {"embed": normal(4, (16, 8)), "layers": {"repeats": repeats}}
    cfg = config(optimizer=name, options={**OPTIONS[name], "weight_decay": 0.1}, clip_norm=1.0)

    def train(params, stacked):
        tx = optim.make(cfg, params, stacked=stacked)
        gradients = jax.tree.map(jnp.sin, params)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(gradients, state, params)
        return updates

    want, got = jax.jit(lambda p: (unstack(train(p, True)), train(unstack(p), False)))(stack)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), want, got)


def test_muon_is_the_same_on_a_mesh_and_on_one_device(mesh):
    cfg = config(optimizer="muon", options=OPTIONS["muon"])

    def update(params):
        tx = optim.make(cfg, params, stacked=False)
        return tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params)[0]

    def model():
        return {
            "q": normal(3, (8, 2, 4), ("data", "model", None)),
            "experts": {"w_in": normal(6, (2, 8, 2, 16), (None, "data", None, "model"))},
            "head": normal(7, (8, 16), ("data", "model")),
        }

    many = jax.jit(update)(model())
    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])):
        one = jax.jit(update)(model())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), many, one)


@pytest.mark.parametrize(
    ("shape", "num_batch", "spec", "specs"),
    [
        # 4 layers take both axes of the width, minor first; 3 take none, so the matrices are
        # gathered
        (
            (4, 8, 16),
            1,
            (None, ("data", "model"), None),
            [("model", "data", None), (("model", "data"), None, None)],
        ),
        ((3, 8, 16), 1, (None, "data", "model"), [(None, None, "model"), (None, None, None)]),
        # the layers are one, so the experts take the axes
        (
            (1, 4, 8, 16),
            2,
            (None, None, "data", "model"),
            [(None, "data", None, "model"), (None, ("data", "model"), None, None)],
        ),
    ],
)
def test_muon_moves_whole_matrices_to_devices_axis_by_axis(mesh, shape, num_batch, spec, specs):
    places = orthogonal._to_whole_matrices(normal(1, shape, spec), num_batch)
    assert [place.spec for place in places] == [jax.P(*s) for s in (spec, *specs)]


def test_muon_never_makes_the_compiler_gather_everything(mesh, capfd):
    """On several axes at once it would, with a warning: "Involuntary full rematerialization"."""
    params = {"w_in": normal(1, (4, 8, 2, 16), (None, "data", None, "model"))}
    tx = optim.make(config(optimizer="muon", options=OPTIONS["muon"]), params, stacked=False)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert "all-to-all" in text and "all-gather" not in text
    assert "rematerialization" not in capfd.readouterr().err


def test_muon_equals_optax_contrib():
    """The same momentum rule, Newton-Schulz steps and scale; optax's bias correction cancels in the
    normalisation.
    """
    params = {"w_out": normal(1, (3, 8, 6)), "q": normal(2, (8, 2, 4))}
    gradients = jax.tree.map(jnp.sin, params)
    axes = optax.contrib.MuonDimensionNumbers
    theirs = optax.contrib.muon(
        1.0,
        beta=0.95,
        consistent_rms=0.2,
        nesterov=False,
        muon_weight_dimension_numbers={"w_out": axes(1, 2), "q": axes(0, (1, 2))},
    )
    want, _ = jax.jit(theirs.update)(gradients, theirs.init(params), params)
    tx = optim.make(config(optimizer="muon", options=OPTIONS["muon"]), params, stacked=False)
    got, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


def test_newton_schulz_makes_singular_values_equal():
    x = normal(1, (3, 5, 9))
    values = jnp.linalg.svd(orthogonal.newton_schulz(x, 5), compute_uv=False)
    assert values.shape == (3, 5) and 0.5 < float(values.min()) and float(values.max()) < 1.3


def test_decay_mask(mesh):
    params = model()
    for stacked, tree in ((True, params), (False, jax.eval_shape(unstack, params))):
        mask = optim.decay_mask("matrices", optim.describe(tree, stacked))
        kept = {
            name_of(p).rpartition("/")[2]
            for p, yes in jax.tree_util.tree_leaves_with_path(mask)
            if yes
        }
        assert kept == {"embed", "q", "o", "w_in", "w_out", "gate"}
    leaves = optim.describe(params, True)
    assert all(jax.tree.leaves(optim.decay_mask("all", leaves)))
    assert not any(jax.tree.leaves(optim.decay_mask("none", leaves)))


def test_weight_decay_is_decoupled_and_masked():
    params = {"w": jnp.full((2, 2), 3.0), "scale": jnp.full((2,), 3.0)}
    cfg = config(options={**OPTIONS["adamw"], "weight_decay": 0.5}, learning_rate=0.1)
    tx = optim.make(cfg, params, stacked=False)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_clip_by_global_norm():
    # |(3, 4)| = 5, clipped to 1: (0.6, 0.8)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}
    assert float(optim.global_norm(gradients)) == pytest.approx(5.0)
    tx = optim.make(
        config(optimizer="sgd", options={"momentum": 0.0, "nesterov": False}, clip_norm=1.0),
        params,
        stacked=False,
    )
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert [float(updates["a"][0]), float(updates["b"][0])] == pytest.approx([-0.6, -0.8])


def test_the_moving_average_of_bfloat16_parameters_moves():
    """1 + 1/256 is 1 in bfloat16, so an average kept in it never leaves its beginning:

    1 - 0.999^1000 = 0.632 of the way is due.
    """
    ema, target = (
        optim.begin_ema({"w": jnp.ones(2, jnp.bfloat16)}),
        {"w": jnp.full(2, 2.0, jnp.bfloat16)},
    )
    ema = jax.lax.fori_loop(0, 1000, lambda _, e: optim.update_ema(e, target, 0.999), ema)
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema["w"], 2 - 0.999**1000, rtol=1e-4)


def test_update_ema():
    ema = optim.update_ema({"w": jnp.full(2, 1.0)}, {"w": jnp.full(2, 3.0)}, 0.75)
    np.testing.assert_allclose(ema["w"], 0.75 * 1.0 + 0.25 * 3.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": "adam"},
            'optim.optimizer = "adam" is not known: choose one of adamw, lion, adafactor, muon, '
            "sgd",
        ),
        ({"optimizers.adamw": {"b1": 0.9, "b2": 0.9}}, "optim.optimizers.adamw.eps is missing"),
        ({"optimizers.adamw.b3": 1}, "unknown key optim.optimizers.adamw.b3"),
        (
            {"schedule": "step"},
            'optim.schedule = "step" is not known: choose one of cosine, wsd, linear, constant',
        ),
        (
            {"schedule": "constant", "schedules.constant.final": 0},
            "unknown key optim.schedules.constant.final",
        ),
        (
            {"decay_mask": "some"},
            'optim.decay_mask = "some" is not known: choose one of matrices, all, none',
        ),
        (
            {"schedule": "wsd", "schedules.wsd.shape": "cubic"},
            'optim.schedules.wsd.shape = "cubic" is not known: choose one of linear, sqrt',
        ),
        (
            {"schedule": "wsd", "schedules.wsd.decay_fraction": 1.1},
            "optim.schedules.wsd.decay_fraction = 1.1 must be at least 0 and at most 1",
        ),
    ],
)
def test_mistakes_are_named(changes, message):
    raw = tiny.raw({"mesh.data": 1})
    for path, value in changes.items():
        *parents, last = path.split(".")
        block = raw["optim"]
        for parent in parents:
            block = block[parent]
        block[last] = value
    with pytest.raises(UserError) as error:
        build(raw, 1)
    assert message in str(error.value)


def test_what_may_not_move_has_no_part_in_the_norm_and_neither_moments_nor_decay():
    """The clipped norm is that of what moves: |(3, 4)| = 5, clipped to 1."""
    params = {"head": {"w": jnp.array([[1.0, 2.0]])}, "body": {"w": jnp.array([[5.0, 6.0]])}}
    grads = {"head": {"w": jnp.array([[3.0, 4.0]])}, "body": {"w": jnp.array([[100.0, 100.0]])}}
    cfg = config(
        "sgd",
        {"momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
        train_only="^head/",
        clip_norm=1.0,
        learning_rate=1.0,
        warmup_steps=0,
    )
    tx = optim.make(cfg, params, stacked=False)
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["head"]["w"], [[-0.6, -0.8]], rtol=1e-6)
    assert not np.any(updates["body"]["w"]) and not np.any(state["direction"].trace["body"]["w"])
    missed = (
        '"^ead/" is found in no name of a parameter: did you mean head/w? they are body/w, head/w'
    )
    for pattern, message in (("(", "is no regular expression"), ("^ead/", missed)):
        with pytest.raises(UserError) as error:
            optim.make(dataclasses.replace(cfg, train_only=pattern), params, stacked=False)
        assert message in str(error.value)
