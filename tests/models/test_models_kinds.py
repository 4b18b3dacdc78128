"""Every kind of model: equal on every mesh, padding, scan, and small cases worked by hand.

In float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from kind_cases import (
    CASES,
    ONE,
    B,
    Run,
    T,
    alone,
    alone_gradient,
    assert_alike,
    close,
    config,
    inputs,
    put,
    tokens,
)
from suites import normal

from moe_jax import layout, train_step
from moe_jax.decoding import sample, translate
from moe_jax.models import MODELS, encoder, mmoe
from moe_jax.moe.layer import Batch
from moe_jax.moe.routing import ROUTERS

every = pytest.mark.parametrize("name", CASES)
# Steps of these are compared on a mesh in tests/tasks/test_tasks.py, too.
STEPPED = ("encoder", "encdec")
# What these have on a mesh, others have, too.
ALIKE = ("prefix", "article, a class")
TURNS = [
    pytest.param(
        name,
        shape,
        id=f"{name}, {meshes.name(shape)}",
        marks=[] if i % 2 == j and name not in STEPPED + ALIKE else [pytest.mark.full],
    )
    for i, name in enumerate(CASES)
    for j, shape in enumerate([(2, 2, 2), (1, 8, 1)])
]


@pytest.mark.parametrize(("name", "shape"), TURNS)
def test_equal_on_every_mesh(float64, name, shape):
    """Logits, sums and the gradient of every parameter, in training (dropout, noise and item
    dropout are the same too).
    """
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
        odd = odd._replace(vectors_BSP=np.where(pad[:, :, None], 1e3, batch.vectors_BSP))
    if name == "encdec":
        ids = np.where(batch.source_rows.segment_BS == 0, 9, batch.source_rows.id_BS)
        odd = odd._replace(source_rows=batch.source_rows._replace(id_BS=ids))
    if name == "mmoe":
        odd = odd._replace(feature_BL=np.where(batch.feature_weight_BL == 0, 9, batch.feature_BL))
    got, got_sums = alone(name)(odd)
    keep = ~pad if got.shape[:2] == pad.shape else slice(None)
    close(got[keep], want[keep], atol=1e-12)
    assert_alike(got_sums, sums, 1e-12)


@pytest.mark.parametrize("name", normal(["mmoe"], [*STEPPED, "mmoe"]))
def test_scan_is_the_loop(float64, name):
    run = Run(dataclasses.replace(CASES[name](), scan=True))
    logits, sums, gradient = run.value_and_gradient(inputs(name))
    want, want_sums, want_gradient = alone_gradient(name)
    close(logits, want, atol=1e-11)
    assert_alike(sums, want_sums, 1e-11)
    assert_alike(layout.unstack(gradient, run.cfg), want_gradient, 1e-10)


# The encoder.


def test_pooling_worked_by_hand(float64):
    """Two rows of three tokens of width 2: the first token of row 0 is padding; all of row 1 is."""
    x = jnp.array([[[9.0, 9], [1, -5], [3, -1]], [[7.0, 7], [7, 7], [7, 7]]])
    valid = jnp.array([[False, True, True], [False, False, False]])
    for how, want in {"sum": [4, -6], "mean": [2, -3], "max": [3, -1], "first": [1, -5]}.items():
        np.testing.assert_array_equal(encoder.pool(x, valid, how), [want, [0, 0]], err_msg=how)


def test_an_encoder_reads_the_whole_row_in_order_unless_it_is_causal(float64):
    """The first token's output: it depends on the last token, and on the order of the tokens, in
    the full mask alone.
    """
    batch = inputs("encoder")
    ids = batch.id_BS.copy()
    ids[0, 4:] = ids[0, 5:3:-1]
    for attention, differs in (("full", True), ("causal", False)):
        run = Run(
            config("encoder", {"pool": "first", "attention": attention}, {"model.repeats": 1})
        )
        change = np.abs(run(batch)[0] - run(batch._replace(id_BS=ids))[0]).max(1)
        assert (change[0] > 1e-6) == differs and (change[1:] == 0).all()


def test_an_encoder_begins_with_what_a_decoder_has(float64):
    """Same names, shapes and first values for embedding, blocks and norm: so train.init_from loads
    a language model.
    """
    changes = {"model.prefix": ("dense",), "model.repeats": 1}
    params = [
        Run(cfg).params
        for cfg in (config("encoder", None, changes), config("decoder", None, changes))
    ]
    ours, theirs = (
        dict(zip(train_step.parameter_names(p), jax.tree.leaves(p), strict=True)) for p in params
    )
    assert set(ours) - set(theirs) == {"head/w", "head/b"} and set(theirs) - set(ours) == {
        "ends/head"
    }
    for name in set(ours) & set(theirs):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# The encoder-decoder.


def test_targets_see_the_source_and_no_later_target(float64):
    batch = inputs("encdec")
    ids, source = batch.id_BS.copy(), batch.source_rows.id_BS.copy()
    ids[0, 4:] = (ids[0, 4:] + 1) % 64
    source[1, 0] = (source[1, 0] + 1) % 64
    run = alone("encdec")
    base = run(batch)[0]
    later = run(batch._replace(id_BS=ids))[0]
    close(later[0, :4], base[0, :4], atol=1e-12)
    assert np.abs(later[0, 4:] - base[0, 4:]).min() > 0
    other = run(batch._replace(source_rows=batch.source_rows._replace(id_BS=source)))[0]
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
            batch = source._replace(id_BS=ids.astype(np.int32), source_rows=source)
            batch = batch._replace(
                position_BS=np.broadcast_to(np.arange(num, dtype=np.int32), ids.shape)
            )
            batch, last = (
                batch._replace(segment_BS=np.ones_like(batch.position_BS)),
                np.full(B, made),
            )
        else:
            there = (source.segment_BS > 0).sum(1)

            def pad(z):
                return np.pad(z, ((0, 0), (0, num)))

            ids = pad(source.id_BS)
            for b in rows:
                ids[b, there[b] : there[b] + made] = out[b, :made]
            place = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
            segment = (place < (there + made)[:, None]).astype(np.int32)
            batch, last = (
                Batch(ids, place, segment, source.row_B, prefix_BS=pad(source.prefix_BS)),
                np.maximum(there + made - 1, 0),
            )
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
        source = source._replace(prefix_BS=source.segment_BS > 0)
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
    sigmoid = ROUTERS["sigmoid"].options()
    for scan in (False, True):
        cfg = dataclasses.replace(CASES["encdec"](), scan=scan)
        cfg = dataclasses.replace(
            cfg, moe=dataclasses.replace(cfg.moe, router="sigmoid", router_options=sigmoid)
        )
        with jax.set_mesh(meshes.make(*ONE)):
            abstract = jax.eval_shape(train_step.make_model(cfg).init, jax.random.key(0))[1]
        states = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), abstract)
        stacked = layout.by_moe_layer(states, cfg)
        assert stacked["bias"].shape == (cfg.num_moe_layers, 8) == (3, 8)
        marked = {"bias": jnp.arange(3.0)[:, None] + jnp.zeros((3, 8))}
        new = layout.into_moe_layers(marked, states, cfg)
        loop = layout.unstack(new, cfg)

        def bias(part, i):
            return float(part["repeats"][i]["blocks"][0]["moe"]["state"]["bias"][0])

        assert [bias(loop["encoder"], 0), bias(loop["encoder"], 1), bias(loop, 0)] == [0, 1, 2]


# The multi-gate mixture.


def test_every_task_has_its_own_gate_and_items(float64):
    """Another gate for task 1 moves the scores of its items alone."""
    run, batch = alone("mmoe"), inputs("mmoe")
    want = run(batch)[0]
    params = jax.tree.map(lambda z: z, run.params)
    for layer in params["repeats"].values():
        router = layer["blocks"][0]["moe"]["router"]
        router["gate"] = router["gate"] * np.array([1.0, -1.0, 1.0])[:, None, None]
    with jax.set_mesh(run.mesh):
        change = np.abs(
            jax.device_get(run.run(params, run.router_state, put(batch), False))[0] - want
        )
    assert (change[:, :7] == 0).all() and (change[:, 11:] == 0).all()
    assert (change[[0, 1, 2, 4], 7:11] > 0).all()


def test_bags_are_the_product_with_multi_hot_rows(float64):
    rng = np.random.default_rng(0)
    table, batch = rng.normal(size=(64, 4)), inputs("mmoe")
    feature, weight = batch.feature_BL, batch.feature_weight_BL
    hot = np.zeros((B, 64))
    np.add.at(hot, (np.arange(B)[:, None], feature), weight)
    with jax.set_mesh(meshes.make(*ONE)):
        close(mmoe.bags(jnp.asarray(table), *put((feature, weight))), hot @ table, atol=1e-12)
    order = rng.permutation(feature.size)
    triples = (z.reshape(-1)[order] for z in (feature, np.repeat(np.arange(B), 5), weight))
    close(
        mmoe.embedding_bag(jnp.asarray(table), *map(jnp.asarray, triples), B),
        hot @ table,
        atol=1e-12,
    )
    np.testing.assert_array_equal(mmoe.from_csr([0, 2, 2, 5]), [0, 0, 2, 2, 2])


@pytest.mark.parametrize("seq_len", [8, 32])
def test_a_kind_made_small_fits_rows_of_any_length(seq_len):
    """A table of positions and the window of a class are as long as a row, also as a longer one."""
    positions = dict(MODELS["encoder"].small({"learned_positions": 16, "input_dim": 64}, seq_len))
    assert positions == {"learned_positions": seq_len, "input_dim": 8}
    assert dict(MODELS["encoder"].small({"learned_positions": 0, "input_dim": 1}, seq_len)) == {
        "learned_positions": 0,
        "input_dim": 1,
    }
    article = MODELS["article"].small({"num_classes": 4, "window": 16}, seq_len)
    assert dict(article) == {"num_experts": 8, "window": seq_len}
