"""Sparse weights of experts in training: exact zeros under every optimizer, every mesh, scan, and
resuming.
"""

import re
from itertools import pairwise, product

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
from suites import normal

from moe_jax import checkpoint, train_step
from moe_jax.errors import UserError
from moe_jax.moe import sparse
from moe_jax.moe.sparse import patterns, rules
from moe_jax.moe.sparse.rules.contract import Now
from moe_jax.parallel import mesh as meshlib
from moe_jax.schema.config import SparseConfig, StoredConfig

pytestmark = pytest.mark.usefixtures("standard_promotion")  # whole models are trained

AT = "model.moe.sparse"
# (rule, pattern) that do not go together.
ODD = [
    ("threshold", "n_m"),
    ("set", "n_m"),
    ("rigl", "n_m"),
    ("set", "units"),
    ("rigl", "units"),
    ("group_lasso", "unstructured"),
    ("group_lasso", "n_m"),
    ("group_lasso", "blocks"),
]
QUICK = {  # rules that change within a few steps of 10
    "static": {},
    "threshold": {},
    "magnitude": {"every": 2, "end": 0.5},
    "set": {"every": 2},
    "rigl": {"every": 2},
    "group_lasso": {"strength": 1.0},
}


def changes(rule, pattern="unstructured", **more):
    """Flat keys of a config with that rule."""
    chosen = {f"{AT}.rules.{rule}.{name}": value for name, value in QUICK[rule].items()}
    small = (
        {f"{AT}.patterns.blocks.block": 4, f"{AT}.patterns.blocks.density": 0.5}
        if pattern == "blocks"
        else {}
    )
    fast = {"train.steps": 10, "optim.warmup_steps": 0, "model.repeats": 1}
    return {**fast, f"{AT}.rule": rule, f"{AT}.pattern": pattern, **chosen, **small, **more}


def now(step=1, steps=10, rate=0.5):
    return Now(jnp.int32(step), steps, jnp.float32(rate), jax.random.key(0))


# In training: the update of a step on two layers of experts alone, which compiles in no time ...

SHAPES = {"w_in": (4, 16, 2, 16), "w_out": (4, 16, 16)}
NAMES = {
    "w_in": ("experts", "expert_embed", None, "hidden"),
    "w_out": ("experts", "hidden", "expert_embed"),
}
REPEATS = 2


def draw(seed, stacked):
    """Random values for every weight, small and large hidden units; the loop and the scan have the
    same.
    """
    rng = np.random.default_rng(seed)
    full = {name: 0.3 * rng.normal(size=(REPEATS, *shape)) for name, shape in SHAPES.items()}
    size_F = np.linspace(0.2, 2, 16)
    full = {"w_in": full["w_in"] * size_F, "w_out": full["w_out"] * size_F[:, None]}

    def place(x, *names):
        return jax.device_put(jnp.asarray(x), meshlib.sharding(*names))

    def layer(i):
        return {
            "experts": {n: place(x[i], *NAMES[n]) for n, x in full.items()},
            "gate": place(full["w_out"][i, 0]),
        }

    def stack(*x):
        return jax.device_put(
            jnp.stack(x), jax.NamedSharding(x[0].sharding.mesh, jax.P(None, *x[0].sharding.spec))
        )

    layers = [layer(i) for i in range(REPEATS)]
    return {"repeats": jax.tree.map(stack, *layers) if stacked else dict(enumerate(layers))}


class Update:
    """`train_step.descend` with given gradients, on a mesh."""

    def __init__(self, shape, given):
        self.cfg, self.mesh = tiny.build(shape, given), meshes.make(*shape)
        self.stacked = self.cfg.model.scan
        with jax.set_mesh(self.mesh):
            self.tx = train_step.make_tx(self.cfg, draw(0, self.stacked))
            self.first, self.one = jax.jit(self._first), jax.jit(self._one)

    def _first(self, params):
        params, masks = sparse.begin(self.cfg.model.moe.sparse, params, stacked=self.stacked)
        return train_step.State(
            jnp.int32(0), params, {}, dict(self.tx.init(params)), None, jnp.int32(0), masks
        )

    def _one(self, now, grads):
        _, params, opt_state, masks = train_step.descend(
            self.cfg, self.tx, now, grads, train_step.step_key(self.cfg, now.step)
        )
        return now._replace(step=now.step + 1, params=params, opt_state=opt_state, masks=masks)

    def run(self, steps):
        """[the state before each step, and at last]."""
        with jax.set_mesh(self.mesh):
            states = [self.first(draw(0, self.stacked))]
            for step in range(steps):
                states.append(self.one(states[-1], draw(step + 1, self.stacked)))
        return states


def layers(tree):
    """{weight: [repeats, ...]} of the loop's tree or the scan's."""
    found = [layer for _, layer in sparse.experts_of(jax.device_get(tree))]
    return (
        found[0]
        if len(found) == 1
        else {name: np.stack([layer[name] for layer in found]) for name in found[0]}
    )


def moments(now, weight):
    """Arrays of the optimizer's state that belong to a weight, layers stacked."""
    named = [
        (jax.tree_util.keystr(p), x)
        for p, x in jax.tree_util.tree_leaves_with_path(jax.device_get(now.opt_state))
    ]
    return [
        x for name, x in named if f"['{weight}']" in name and x.shape == (REPEATS, *SHAPES[weight])
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_masked_entries_stay_exactly_zero_under_every_optimizer(optimizer):
    states = Update(
        (1, 1, 1), changes("rigl", **{"optim.optimizer": optimizer, "model.scan": True})
    ).run(3)
    first, last = states[0], states[-1]
    for name, x in layers(last.params).items():
        mask, old = layers(last.masks)[name], layers(first.masks)[name]
        assert (mask.mean((2, 3)) == 0.25).all() if name == "w_out" else mask.mean() == 0.25
        assert (mask != old).any() and (x[~mask] == 0).all()
        found = moments(last, name)
        assert len(found) == {"adamw": 2, "adafactor": 1}.get(
            optimizer, 1
        )  # 16 columns: Adafactor factors nothing
        assert all((m[~mask] == 0).all() and (m[mask & old] != 0).all() for m in found)
        assert (x[mask & old] != layers(first.params)[name][mask & old]).any()

    def dense(now):
        return now.params["repeats"]["gate"]

    assert (dense(last) != dense(first)).all() and (dense(last) != 0).all()


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_blocks_of_a_static_mask_stay_exactly_zero(optimizer):
    states = Update((1, 1, 1), changes("static", "blocks", **{"optim.optimizer": optimizer})).run(2)
    for name, x in layers(states[-1].params).items():
        mask = layers(states[0].masks)[name]
        assert mask.mean() == 0.5 and (x[~mask] == 0).all() and (x[mask] != 0).all()


def test_masks_change_when_they_are_due():
    states = Update((1, 1, 1), changes("set")).run(4)
    masks = [layers(now.masks)["w_in"] for now in states]
    assert [(a != b).any() for a, b in pairwise(masks)] == [False, True, False, True]
    # what comes, comes at 0, and moves with the next step
    new = masks[2] & ~masks[1]
    assert (layers(states[2].params)["w_in"][new] == 0).all() and (
        layers(states[3].params)["w_in"][new] != 0
    ).all()
    # every layer and expert draws its own
    assert (masks[2][0] != masks[2][1]).any() and (masks[2][0, 0] != masks[2][0, 1]).any()


def test_a_static_mask_never_changes():
    states = Update((1, 1, 1), changes("static", "n_m")).run(3)
    jax.tree.map(np.testing.assert_array_equal, states[0].masks, states[-1].masks)
    w = layers(states[-1].params)["w_out"].reshape(REPEATS, 4, 4, 4, 16)
    assert ((w != 0).sum(3) == 2).all()


def test_group_lasso_makes_whole_units_zero():
    states = Update(
        (1, 1, 1), changes("group_lasso", "units", **{"optim.learning_rate": 0.05})
    ).run(3)
    w = layers(states[-1].params)
    dead = (w["w_out"] == 0).all(3)
    assert 0 < dead.mean() < 1 and states[-1].masks == {}
    assert ((w["w_in"] == 0) == dead[:, :, None, None, :]).all() and (
        (w["w_out"] == 0) == dead[..., None]
    ).all()


PAIRS = [("rigl", "unstructured"), ("set", "blocks"), ("magnitude", "units"), ("static", "n_m")]
PAIRS += [("threshold", "unstructured"), ("threshold", "blocks"), ("group_lasso", "units")]


# Of those that keep masks, and of those that do not.
NORMAL = [("rigl", "unstructured"), ("group_lasso", "units")]


@pytest.mark.parametrize(("rule", "pattern"), normal(NORMAL, PAIRS))
def test_every_mesh_and_the_scan_have_the_same_masks_and_weights(float64, rule, pattern):
    given = changes(rule, pattern, **{"optim.learning_rate": 0.05})
    states = Update((1, 1, 1), given).run(4)
    want = states[-1]
    assert 0.1 < float(sparse.density(want.params)) < 0.9
    if rule in ("rigl", "set", "magnitude"):
        assert (layers(states[0].masks)["w_in"] != layers(want.masks)["w_in"]).any()
    for shape, scan in (((2, 2, 2), True), ((1, 4, 2), False)):
        have = Update(shape, {**given, "model.scan": scan}).run(4)[-1]
        for name, x in layers(want.params).items():
            other = layers(have.params)[name]
            np.testing.assert_array_equal(x == 0, other == 0)
            np.testing.assert_allclose(x, other, atol=1e-12)
        if want.masks:
            jax.tree.map(np.testing.assert_array_equal, layers(want.masks), layers(have.masks))
        if want.masks and rule != "threshold":

            def specs(tree):
                return [w.sharding.spec for _, e in sparse.experts_of(tree) for w in e.values()]

            assert specs(have.masks) == specs(have.params) and any(
                any(spec) for spec in specs(have.masks)
            )


# ... and whole steps of a whole model.


@pytest.fixture(scope="module")
def programs():
    """One device with the loop, and a mesh with the scan, in float64; all that a step may have
    beside.
    """
    given = changes(
        "set", **{"optim.ema_decay": 0.5, "train.micro_batch_size": 8, "train.batch_size": 16}
    )
    given["train.nonfinite_patience"] = 1
    jax.config.update("jax_enable_x64", True)
    yield tiny.Program((1, 1, 1), given), tiny.Program((2, 2, 2), {**given, "model.scan": True})
    jax.config.update("jax_enable_x64", False)


def compare(want, have):
    """The same zeros and the same weights; `have` may be stacked."""
    for part in ("params", "ema", "masks"):
        (_, a), (_, b) = (
            next(sparse.experts_of(jax.device_get(getattr(s, part)))) for s in (want, have)
        )
        for name, x in a.items():
            y = b[name].reshape(x.shape)  # one layer
            np.testing.assert_array_equal(x == 0, y == 0)
            np.testing.assert_allclose(x.astype(float), y.astype(float), atol=1e-9)


def test_steps_resume_bit_for_bit_and_on_another_mesh(float64, programs, tmp_path):
    one, other = programs
    middle, _ = one.run(3)
    want, rows = one.run(2, middle, 3)
    zeros = next(sparse.experts_of(jax.device_get(want.masks)))[1]["w_in"] == 0
    assert zeros.mean() == 0.75 and rows[-1]["expert_density"] == pytest.approx(0.25, abs=0.01)
    assert all(
        (next(sparse.experts_of(jax.device_get(t)))[1]["w_in"][zeros] == 0).all()
        for t in (want.params, want.ema)
    )
    with jax.set_mesh(one.mesh):
        saves = checkpoint.Checkpoints(tmp_path, every=0, keep=1, keep_best=0)
        saves.save(3, middle, metadata={}, score=None, stacked=False)
        saves.close()

    def resumed(program, stacked):
        with jax.set_mesh(program.mesh):
            abstract = jax.eval_shape(program.init, jax.random.key(0))
            found = checkpoint.Checkpoints(tmp_path, every=0, keep=1, keep_best=0).restore(
                3, abstract, stacked=stacked
            )
        return program.run(2, found, 3)[0]

    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(want), jax.device_get(resumed(one, False))
    )
    compare(want, resumed(other, True))
    compare(want, other.run(5)[0])


def test_a_skipped_step_changes_no_mask(float64, programs):
    program = programs[0]
    state, _ = program.run(1)  # the next step changes masks
    ends = jax.tree.map(lambda x: x * jnp.nan, state.params["ends"])
    last, rows = program.run(1, state._replace(params={**state.params, "ends": ends}), 1)
    going, _ = program.run(1, state, 1)
    flat = [jax.tree.leaves(jax.device_get(s.masks)) for s in (state, last, going)]
    assert rows[0]["skipped"] == 1 and all(
        (a == b).all() for a, b in zip(flat[0], flat[1], strict=True)
    )
    assert any((a != b).any() for a, b in zip(flat[0], flat[2], strict=True))


def test_dense_experts_keep_no_masks():
    cfg = tiny.build(changes={"model.param_dtype": "float32", "model.dtype": "float32"})
    with jax.set_mesh(meshes.make(1, 1, 1)):
        model = train_step.make_model(cfg.model)
        assert jax.eval_shape(train_step.initial(cfg, model), jax.random.key(0)).masks == ()


def test_experts_of_one_vector():
    params = {"experts": {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}, "other": jnp.ones(3)}

    def make(pattern, **options):
        return SparseConfig(
            rule="static",
            rule_options=rules.RULES["static"].options(),
            pattern=pattern,
            pattern_options=patterns.PATTERNS[pattern].options(**options),
            stored=StoredConfig(),
        )

    cfg = make("unstructured", density=0.5)
    new, masks = sparse.begin(cfg, params, stacked=False)
    assert new["experts"]["w"].tolist() == [[0, 0, 3, 4], [0, 0, 7, 8]] and new[
        "other"
    ].tolist() == [1, 1, 1]
    assert float(sparse.density(new)) == 0.5
    state = {
        "mu": {"experts": {"w": jnp.ones((2, 4))}, "other": jnp.ones(3)},
        "count": jnp.int32(3),
    }
    zeroed = sparse.mask_moments(state, masks)
    assert zeroed["mu"]["experts"]["w"].tolist() == [[0, 0, 1, 1]] * 2 and zeroed["count"] == 3
    for pattern, options in (("units", {"density": 0.5}), ("n_m", {"n": 2, "m": 4})):
        with pytest.raises(UserError, match=f'pattern = "{pattern}" does not fit experts'):
            sparse.begin(make(pattern, **options), params, stacked=False)
    with pytest.raises(UserError, match="this model has none"):
        sparse.begin(cfg, {"other": jnp.ones(3)}, stacked=False)


@pytest.mark.parametrize(("rule", "pattern"), ODD)
def test_combinations_that_make_no_sense(rule, pattern):
    with pytest.raises(
        UserError, match=re.escape(f'{AT}.rule = "{rule}" and {AT}.pattern = "{pattern}" do not go')
    ):
        tiny.build(changes={f"{AT}.rule": rule, f"{AT}.pattern": pattern})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {f"{AT}.rule": "lottery"},
            f'{AT}.rule = "lottery" is not known: choose one of none, static, ',
        ),
        (
            {f"{AT}.patterns.unstructured.density": 0.0},
            "density = 0.0 must be above 0 and at most 1",
        ),
        (
            {f"{AT}.patterns.unstructured.density": 1.5},
            "density = 1.5 must be above 0 and at most 1",
        ),
        (
            {f"{AT}.rule": "rigl", f"{AT}.rules.rigl.fraction": 2.0},
            "rigl.fraction = 2.0 must be at least 0 and at most 1",
        ),
        ({f"{AT}.rule": "set", f"{AT}.rules.set.every": 0}, "set.every = 0 must be at least 1"),
        (
            {f"{AT}.pattern": "blocks"},
            "model.moe.expert_hidden (24) must be divisible by model.moe.sparse.patterns.blocks",
        ),
        (
            {f"{AT}.pattern": "n_m", f"{AT}.patterns.n_m.n": 5},
            "patterns.n_m.n (5) must lie between 1 and",
        ),
    ],
)
def test_bad_values(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        tiny.build(changes={f"{AT}.rule": "static", "model.moe.expert_hidden": 24, **given})


def test_a_rule_that_moves_experts_does_not_go_with_frozen_ones():
    for rule in rules.RULES:
        pattern = "units" if rule == "group_lasso" else "unstructured"
        given = changes(rule, pattern, **{"optim.train_only": "^head/"})
        if rule == "static":
            tiny.build(changes=given)
            continue
        with pytest.raises(
            UserError, match=re.escape('optim.train_only = "^head/" would not keep it from')
        ):
            tiny.build(changes=given)


def test_every_other_combination_runs():
    """Each rule and pattern, one traced step; the tests above look closely at some."""
    cfg = tiny.build().model.moe.sparse
    assert set(rules.RULES) == set(tiny.raw()["model"]["moe"]["sparse"]["rules"]) - {cfg.rule}
    assert set(patterns.PATTERNS) == set(tiny.raw()["model"]["moe"]["sparse"]["patterns"])
    params = {"experts": {"w_in": jnp.ones((2, 8, 2, 8)), "w_out": jnp.ones((2, 8, 8))}}
    for rule, pattern in product(rules.RULES, patterns.PATTERNS):
        if (rule, pattern) in ODD:
            continue
        cfg = tiny.build(changes=changes(rule, pattern)).model.moe.sparse
        first, masks = jax.eval_shape(
            lambda p, cfg=cfg: sparse.begin(cfg, p, stacked=False), params
        )

        def run(p, m, cfg=cfg):
            return sparse.advance(cfg, now(), p, p, m, stacked=False)

        assert jax.tree.map(
            lambda x: (x.shape, x.dtype), jax.eval_shape(run, first, masks)
        ) == jax.tree.map(lambda x: (x.shape, x.dtype), (first, masks))


def test_what_comes_begins_at_zero_after_a_dense_update():
    """Muon's update is dense, although gradients and moments are masked."""
    cfg = SparseConfig(
        rule="set",
        rule_options=rules.RULES["set"].options(fraction=0.5, end=1.0, every=1),
        pattern="unstructured",
        pattern_options=patterns.PATTERNS["unstructured"].options(density=0.5),
        stored=StoredConfig(),
    )
    weights = jnp.arange(1.0, 33.0).reshape(1, 4, 2, 4)
    params = {"experts": {"w_in": weights, "w_out": jnp.ones((1, 4, 4))}}
    params, masks = sparse.begin(cfg, params, stacked=False)
    updated = jax.tree.map(lambda w: w + 1.0, params)
    after, changed = sparse.advance(cfg, now(), params, updated, masks, stacked=False)
    for name, old in masks["experts"].items():
        comes = changed["experts"][name] & ~old
        assert comes.any()
        assert not after["experts"][name][comes].any()
