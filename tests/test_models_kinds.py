"""Every kind of model: equal on every mesh, padding, scan, and small cases worked by hand. In float64."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import meshes
import models
import numpy as np
import pytest

from configs import base
from moe_jax import sample, state, translate
from moe_jax.config import Options
from moe_jax.models import MODELS, article, encoder, kinds, mmoe, router_states
from moe_jax.moe import causality, load, losses
from moe_jax.moe.layer import Batch

B, S, T, P = 8, 6, 5, 3  # rows, tokens, source tokens, width of a vector
ONE = (1, 1, 1)


@pytest.fixture(autouse=True, scope="module")
def quick_compiler():
    """Tiny programs that run once or twice are all compilation."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config(kind, options=None, model=None, moe=None):
    """The ModelConfig of a kind with some options of its own, some keys of the model, and some of its experts."""
    cfg = models.build(changes=model).model
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in base.get_config().model.kinds[kind].items()}
    moe_cfg = dataclasses.replace(cfg.moe, **(moe or {}))
    return dataclasses.replace(cfg, kind=kind, kind_options=Options(own | (options or {})), moe=moe_cfg)


MULTI = {"router": "multi_gate", "router_options": Options(k=2, num_gates=3, renormalize=True)}
NOISY = {"router": "noisy_top_k", "router_options": Options(k=2, min_noise=0.01)}
PATTERN = {"model.prefix": ("dense",), "model.repeats": 1, "model.dropout": 0.2}
CASES = {
    "encoder": lambda: config("encoder", {"num_classes": 3, "head_dropout": 0.1}, PATTERN, NOISY),
    "encoder of vectors": lambda: config(
        "encoder", {"inputs": "vectors", "input_dim": P, "pool": "max", "learned_positions": S}, {"model.repeats": 1}
    ),
    "encdec": lambda: config("encdec", {"encoder_repeats": 2}, {"model.dropout": 0.2, "model.repeats": 1}),
    "prefix": lambda: config("decoder", {"bidirectional_prefix": True}, {"model.repeats": 1}),
    "mmoe": lambda: config(
        "mmoe", {"items": (7, 4, 2), "item_dropout": 0.3}, {"model.dropout": 0.2, "model.repeats": 1}, MULTI
    ),
    "article": lambda: config("article", {"window": 4}),
    "article, a class": lambda: config("article", {"window": 9, "num_classes": 3, "aggregate": "gated"}),
}
every = pytest.mark.parametrize("name", CASES)
close = functools.partial(np.testing.assert_allclose, rtol=0)


def tokens(rng, length, lengths):
    """A Batch of rows with so many tokens each."""
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    there = place < np.asarray(lengths)[:, None]
    ids = rng.integers(1, 64, (B, length)).astype(np.int32)
    return Batch(ids, place, there.astype(np.int32), np.arange(B, dtype=np.int32) + 50)


def inputs(name, seed=0):
    """A batch for the kind: rows of several lengths, one without any token, and one without source."""
    rng = np.random.default_rng(seed)
    batch = tokens(rng, S, [6, 3, 1, 0, 6, 2, 5, 4])
    if name == "encoder of vectors":
        return batch._replace(inputs=rng.normal(size=(B, S, P)))
    if name == "encdec":
        return batch._replace(inputs=tokens(rng, T, [5, 1, 0, 3, 2, 5, 4, 5]))
    if name == "prefix":
        return batch._replace(inputs=np.arange(S)[None] < np.array([2, 3, 0, 0, 4, 1, 5, 1])[:, None])
    if name == "mmoe":
        weight = rng.random((B, 5)) * (rng.random((B, 5)) < 0.7)
        weight[3] = 0
        return batch._replace(inputs=(rng.integers(0, 64, (B, 5)).astype(np.int32), weight))
    return batch


def put(batch):
    return jax.tree.map(lambda z: meshes.put(z, "batch"), batch)


class Run:
    """A model of a kind on a mesh with random parameters."""

    def __init__(self, cfg, shape=ONE):
        self.cfg, self.mesh = cfg, meshes.make(*shape)
        with jax.set_mesh(self.mesh):
            self.model = state.make_model(cfg)
            self.params, self.router_state = jax.jit(self.model.init)(jax.random.key(0))
            self.run = jax.jit(
                lambda p, r, b, train: self.model.bind(p, r)(b, jax.random.key(3), train), static_argnums=3
            )
            # what begins at zero or one is moved, so that nothing is special
            odd = lambda path, z: z + 0.1 * jnp.sin(jnp.arange(z.shape[-1])) if "bias" in str(path) else z
            self.params = jax.jit(functools.partial(jax.tree_util.tree_map_with_path, odd))(self.params)

    def __call__(self, batch, train=False):
        """(logits, sums) as NumPy arrays."""
        with jax.set_mesh(self.mesh):
            return jax.device_get(self.run(self.params, self.router_state, put(batch), train))

    def value_and_gradient(self, batch):
        """Of a smooth function of logits and balance losses, in training: (logits, sums, gradient)."""

        def value(params, batch):
            logits, sums = self.model.bind(params, self.router_state)(batch, jax.random.key(3), True)
            extra = losses.auxiliary(load.totals(sums), {"balance": 0.5, "z": 0.1})[0] if sums else 0.0
            wave = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)
            place = jax.typeof(logits).sharding
            return (jnp.sin(logits) * jax.sharding.reshard(wave, place)).sum() + extra, (logits, sums)

        with jax.set_mesh(self.mesh):
            run = jax.jit(jax.grad(value, has_aux=True))
            gradient, (logits, sums) = jax.device_get(run(self.params, put(batch)))
        return logits, sums, gradient


@functools.cache
def alone(name):
    return Run(CASES[name]())


@functools.cache
def alone_gradient(name):
    return alone(name).value_and_gradient(inputs(name))


def assert_alike(got, want, atol):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: close(a, b, atol=atol), got, want)


TURNS = [
    pytest.param(name, shape, id=f"{name}, {meshes.name(shape)}", marks=[] if i % 2 == j else [pytest.mark.full])
    for i, name in enumerate(CASES)
    for j, shape in enumerate([(2, 2, 2), (1, 8, 1)])
]


@pytest.mark.parametrize(("name", "shape"), TURNS)
def test_equal_on_every_mesh(float64, name, shape):
    """Logits, sums and the gradient of every parameter, in training (dropout, noise and item dropout are the same too)."""
    got = Run(CASES[name](), shape).value_and_gradient(inputs(name))
    want = alone_gradient(name)
    assert_alike(got, want, 1e-10)
    assert np.isfinite(want[0]).all()
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(want[2]))


@every
def test_padding_changes_nothing(float64, name):
    batch = inputs(name)
    want, sums = alone(name)(batch)
    pad = batch.segment_BS == 0
    odd = batch._replace(id_BS=np.where(pad, 9, batch.id_BS))
    if name == "encoder of vectors":
        odd = odd._replace(inputs=np.where(pad[:, :, None], 1e3, batch.inputs))
    if name == "encdec":
        ids = np.where(batch.inputs.segment_BS == 0, 9, batch.inputs.id_BS)
        odd = odd._replace(inputs=batch.inputs._replace(id_BS=ids))
    if name == "mmoe":
        features, weight = batch.inputs
        odd = odd._replace(inputs=(np.where(weight == 0, 9, features), weight))
    got, got_sums = alone(name)(odd)
    keep = ~pad if got.shape[:2] == pad.shape else slice(None)
    close(got[keep], want[keep], atol=1e-12)
    assert_alike(got_sums, sums, 1e-12)


@pytest.mark.parametrize("name", ["encoder", "encdec", "mmoe"])
def test_scan_is_the_loop(float64, name):
    run = Run(dataclasses.replace(CASES[name](), scan=True))
    logits, sums, gradient = run.value_and_gradient(inputs(name))
    want, want_sums, want_gradient = alone_gradient(name)
    close(logits, want, atol=1e-11)
    assert_alike(sums, want_sums, 1e-11)
    assert_alike(translate.unstacked(gradient, run.cfg), want_gradient, 1e-10)


# The encoder.


def test_pooling_worked_by_hand(float64):
    """Two rows of three tokens of width 2: the first token of row 0 is padding; all of row 1 is."""
    x = jnp.array([[[9.0, 9], [1, -5], [3, -1]], [[7.0, 7], [7, 7], [7, 7]]])
    valid = jnp.array([[False, True, True], [False, False, False]])
    for how, want in {"sum": [4, -6], "mean": [2, -3], "max": [3, -1], "first": [1, -5]}.items():
        np.testing.assert_array_equal(encoder.pool(x, valid, how), [want, [0, 0]], err_msg=how)


def test_an_encoder_reads_the_whole_row_in_order_unless_it_is_causal(float64):
    """The first token's output: it depends on the last token, and on the order of the tokens, in the full mask alone."""
    batch = inputs("encoder")
    ids = batch.id_BS.copy()
    ids[0, 4:] = ids[0, 5:3:-1]
    for attention, differs in (("full", True), ("causal", False)):
        run = Run(config("encoder", {"pool": "first", "attention": attention}, {"model.repeats": 1}))
        change = np.abs(run(batch)[0] - run(batch._replace(id_BS=ids))[0]).max(1)
        assert (change[0] > 1e-6) == differs and (change[1:] == 0).all()


def test_an_encoder_begins_with_what_a_decoder_has(float64):
    """Same names, shapes and first values for embedding, blocks and norm: so train.init_from loads a language model."""
    changes = {"model.prefix": ("dense",), "model.repeats": 1}
    params = [Run(cfg).params for cfg in (config("encoder", None, changes), config("decoder", None, changes))]
    ours, theirs = (dict(zip(state.parameter_names(p), jax.tree.leaves(p), strict=True)) for p in params)
    assert set(ours) - set(theirs) == {"head/w", "head/b"} and set(theirs) - set(ours) == {"ends/head"}
    for name in set(ours) & set(theirs):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# The encoder-decoder.


def test_targets_see_the_source_and_no_later_target(float64):
    batch = inputs("encdec")
    ids, source = batch.id_BS.copy(), batch.inputs.id_BS.copy()
    ids[0, 4:] = (ids[0, 4:] + 1) % 64
    source[1, 0] = (source[1, 0] + 1) % 64
    run = alone("encdec")
    base = run(batch)[0]
    later = run(batch._replace(id_BS=ids))[0]
    close(later[0, :4], base[0, :4], atol=1e-12)
    assert np.abs(later[0, 4:] - base[0, 4:]).min() > 0
    other = run(batch._replace(inputs=batch.inputs._replace(id_BS=source)))[0]
    assert np.abs(other[1, :3] - base[1, :3]).max() > 1e-6
    close(other[2:], base[2:], atol=1e-12)


def greedy(run, source, num, boundary):
    """[B, num] by the whole model anew for every token."""
    rows = np.arange(B)
    out = np.full((B, num), boundary, np.int32)
    live = (source.segment_BS > 0).any(1)
    for made in range(num):
        if run.cfg.kind == "encdec":
            ids = np.concatenate([np.full((B, 1), boundary), out], 1)[:, :num]
            batch = source._replace(id_BS=ids.astype(np.int32), inputs=source)
            batch = batch._replace(position_BS=np.broadcast_to(np.arange(num, dtype=np.int32), ids.shape))
            batch, last = batch._replace(segment_BS=np.ones_like(batch.position_BS)), np.full(B, made)
        else:
            there = (source.segment_BS > 0).sum(1)
            pad = lambda z: np.pad(z, ((0, 0), (0, num)))
            ids = pad(source.id_BS)
            for b in rows:
                ids[b, there[b] : there[b] + made] = out[b, :made]
            place = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
            segment = (place < (there + made)[:, None]).astype(np.int32)
            batch, last = Batch(ids, place, segment, source.row_B, pad(source.inputs)), np.maximum(there + made - 1, 0)
        best = run(batch)[0][rows, last].argmax(-1)
        out[:, made] = np.where(live, best, boundary)
        live = live & (out[:, made] != boundary)
    return out


@pytest.mark.parametrize(("name", "shape"), [("encdec", (2, 2, 2)), ("prefix", ONE)])
def test_translation_with_a_cache_is_the_argmax_without(float64, name, shape):
    """The boundary is a token that rows really end with; greedy ignores all else of the dials."""
    cfg = dataclasses.replace(CASES[name](), scan=shape == ONE)
    run = alone(name)
    source = tokens(np.random.default_rng(2), T, [5, 1, 0, 3, 2, 5, 4, 5])
    if name == "prefix":
        source = source._replace(inputs=source.segment_BS > 0)
    free = greedy(run, source, 6, -1 % 64)
    boundary = int(free[0, 3])
    want = greedy(run, source, 6, boundary)
    assert (want == boundary).any() and (want != boundary).any()
    other = Run(cfg, shape)
    with jax.set_mesh(other.mesh):
        run = translate.make_translator(cfg, 6, boundary, 64)
        dials = sample.dials(sample.Settings(6, 0.0, 0, 1.0, 0, ()))
        got = np.asarray(run(other.params, other.router_state, source, dials))
    np.testing.assert_array_equal(got, want)


def test_router_states_are_those_of_the_encoder_then_of_the_decoder(float64):
    sigmoid = Options(base.get_config().model.moe.routers.sigmoid.to_dict())
    for scan in (False, True):
        cfg = dataclasses.replace(CASES["encdec"](), scan=scan)
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, router="sigmoid", router_options=sigmoid))
        with jax.set_mesh(meshes.make(*ONE)):
            abstract = jax.eval_shape(state.make_model(cfg).init, jax.random.key(0))[1]
        states = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), abstract)
        stacked = router_states.stack(states, cfg)
        assert stacked["bias"].shape == (cfg.num_moe_layers, 8) == (3, 8)
        marked = {"bias": jnp.arange(3.0)[:, None] + jnp.zeros((3, 8))}
        new = router_states.unstack(states, marked, cfg)
        loop = translate.unstacked(new, cfg) if scan else new
        bias = lambda part, i: float(part["repeats"][i]["blocks"][0]["moe"]["state"]["bias"][0])
        assert [bias(loop["encoder"], 0), bias(loop["encoder"], 1), bias(loop, 0)] == [0, 1, 2]


# The multi-gate mixture.


def test_every_task_has_its_own_gate_and_items(float64):
    """Another gate for task 1 moves the scores of its items alone."""
    run, batch = alone("mmoe"), inputs("mmoe")
    want = run(batch)[0]
    params = jax.tree.map(lambda z: z, run.params)
    for layer in params["repeats"].values():
        router = layer["blocks"][0]["moe"]["router"]
        router["gate"] = router["gate"].at[1].multiply(-1)
    with jax.set_mesh(run.mesh):
        change = np.abs(jax.device_get(run.run(params, run.router_state, put(batch), False))[0] - want)
    assert (change[:, :7] == 0).all() and (change[:, 11:] == 0).all()
    assert (change[[0, 1, 2, 4], 7:11] > 0).all()


def test_bags_are_the_product_with_multi_hot_rows(float64):
    rng = np.random.default_rng(0)
    table, (feature, weight) = rng.normal(size=(64, 4)), inputs("mmoe").inputs
    hot = np.zeros((B, 64))
    np.add.at(hot, (np.arange(B)[:, None], feature), weight)
    with jax.set_mesh(meshes.make(*ONE)):
        close(mmoe.bags(jnp.asarray(table), *put((feature, weight))), hot @ table, atol=1e-12)
    order = rng.permutation(feature.size)
    triples = (z.reshape(-1)[order] for z in (feature, np.repeat(np.arange(B), 5), weight))
    close(mmoe.embedding_bag(jnp.asarray(table), *map(jnp.asarray, triples), B), hot @ table, atol=1e-12)
    np.testing.assert_array_equal(mmoe.from_csr([0, 2, 2, 5]), [0, 0, 2, 2, 2])


# The article.


def test_the_articles_example(float64):
    """Section 4.3: E has the rows apple (0.1, 0.2) and banana (0.3, 0.4), W the rows (0.5, 0), (0, 0.6), (0, 0), (0, 0); g is the sum.

        z_1 = 0.5 (0.1, 0.2) = (0.05, 0.10)      z_2 = 0.6 (0.3, 0.4) = (0.18, 0.24)      z_3 = z_4 = (0, 0)
        h = z_1 + z_2 = (0.23, 0.34)
        softmax(h) = (1 / (1 + e^0.11), 1 / (1 + e^-0.11)) = (0.472528, 0.527472)

    The article prints h = 0.55 and 0.6: 0.55 is one number where h is a vector of two, its terms add up to 0.62 and not to 0.55 (0.05 +
    0.18 + 0.15 + 0.24), and the 0.45 of the second class comes from nowhere.
    """
    cfg = config("article", {"num_experts": 4, "window": 2, "activation": "identity", "num_classes": 2}, {})
    cfg = dataclasses.replace(cfg, d_model=2, vocab_size=2)
    run = Run(cfg)
    run.params["ends"] = {"embed": jnp.array([[0.1, 0.2], [0.3, 0.4]]), "head": jnp.eye(2)}
    run.params["experts"] = {"w": jnp.array([[0.5, 0], [0, 0.6], [0, 0], [0, 0]])}
    row = Batch(*(np.asarray(z, np.int32) for z in ([[0, 1]], [[0, 1]], [[1, 1]], [0])))
    h = run(row)[0][0]
    close(h, [0.23, 0.34], atol=1e-15)
    close(jax.nn.softmax(h), [0.472528, 0.527472], atol=1e-6)
    assert 0.5 * 0.1 + 0.6 * 0.3 + 0.5 * 0.3 + 0.6 * 0.4 == pytest.approx(0.62)


@pytest.mark.parametrize("aggregate", ["sum", "mean", "gated"])
def test_the_articles_windows_are_the_last_tokens_of_the_segment(float64, aggregate):
    """Against a loop over tokens, experts and places, on packed rows with padding."""
    cfg = config("article", {"num_experts": 8, "window": 4, "aggregate": aggregate, "activation": "relu"})
    run, batch = Run(cfg), inputs("article")
    segment = np.tile(np.array([[1, 1, 2, 2, 2, 2]]), (B, 1)) * batch.segment_BS
    logits = run(batch._replace(segment_BS=segment.astype(np.int32)))[0]
    embed, head, w = (np.asarray(z) for z in (*run.params["ends"].values(), run.params["experts"]["w"]))
    for b, i in np.argwhere(segment > 0):
        seen = [j for j in range(max(i - 3, 0), i + 1) if segment[b, j] == segment[b, i]]
        e = embed[batch.id_BS[b, seen]]
        z = np.maximum([w[n, 3 - i + np.array(seen)] @ e for n in range(8)], 0)
        weight = {"sum": np.ones(8), "mean": np.full(8, 1 / 8)}.get(aggregate)
        if weight is None:
            weight = np.asarray(jax.nn.softmax(e.mean(0) @ np.asarray(run.params["router"]["gate"])))
        close(logits[b, i], weight @ z @ head, atol=1e-12)


# Rules.


def test_every_kind_has_options_and_a_model():
    assert set(MODELS) == set(base.get_config().model.kinds)
    assert {kind for _, kind in [(n, c().kind) for n, c in CASES.items()]} == set(MODELS)
    assert article.AGGREGATES == ("sum", "mean", "gated")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("encoder", {"pool": "median"}, 'pool = "median" is not known: choose one of sum, mean, max, first'),
        ("encoder", {"attention": "none"}, 'attention = "none" is not known: choose one of full, causal'),
        ("encoder", {"num_classes": 1}, "num_classes = 1 must be at least 2"),
        ("encoder", {"learned_positions": 7}, r"learned_positions \(7\) must be at least data.seq_len \(8\), or 0"),
        ("encoder", {"head_dropout": 1.0}, "head_dropout = 1.0 must be at least 0 and below 1"),
        ("encdec", {"encoder_repeats": 0}, "needs a block in both"),
        ("encdec", {"encoder_prefix": ("sparse",)}, 'encoder_prefix = "sparse" is not known: choose one of dense, moe'),
        ("mmoe", {"items": (3, 0)}, r"items = \(3, 0\) must give every task at least one item"),
        ("mmoe", {"items": (3, 4)}, r"num_gates \(3\) must be the number of tasks: .*items \(3, 4\) are 2"),
        ("article", {"num_experts": 0}, "num_experts = 0 must be at least 1"),
        ("article", {"num_classes": 2, "window": 7}, r"window \(7\) must be at least data.seq_len \(8\)"),
        ("article", {"aggregate": "max"}, 'aggregate = "max" is not known: choose one of sum, mean, gated'),
    ],
)
def test_bad_options_are_refused_by_name(kind, options, message):
    whole = dataclasses.replace(models.build(), model=config(kind, options, None, MULTI if kind == "mmoe" else None))
    found = next(kinds.refusals(whole))
    assert re.search(message, found) and found.startswith(("model.", "an encoder-decoder"))


@every
def test_good_options_are_not_refused(name):
    whole = models.build()
    whole = dataclasses.replace(whole, model=CASES[name](), data=dataclasses.replace(whole.data, seq_len=S))
    assert not list(kinds.refusals(whole))


def test_experts_of_the_article_are_split_over_the_expert_axis():
    cfg = dataclasses.replace(models.build((1, 2, 1)), model=config("article", {"num_experts": 5}))
    assert "num_experts (5) must be divisible by mesh.expert (2)" in next(kinds.refusals(cfg))


def test_only_what_predicts_is_causal():
    choice = Options(factor=2.0)
    moe = {"router": "expert_choice", "router_options": choice}
    assert causality.leaks(config("decoder", None, None, moe)).future
    assert causality.leaks(config("encdec", None, None, moe)).future
    for kind in ("encoder", "mmoe"):
        cfg = config(kind, None, None, moe)
        assert not any(causality.leaks(cfg)) and causality.reasons(cfg) == []
        shared = config(kind, None, None, {**moe, "group_rows": 2})
        assert causality.leaks(shared).batch and causality.reasons(shared)
