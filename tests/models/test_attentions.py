"""Attentions: which keys a token sees, against masks that are not ours; and that decoding, meshes,
counts and labels follow.
"""

import dataclasses

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
import torch
from block_options import OPTIONS
from kind_cases import config as kind_config
from suites import normal
from transformers.masking_utils import sliding_window_causal_mask_function

from moe_jax import config
from moe_jax.config import advice, causality, config_file
from moe_jax.errors import UserError
from moe_jax.instruments import leak
from moe_jax.models import attention_parts
from moe_jax.models.attention_core import attention, causal, windowed
from moe_jax.models.attentions import ATTENTIONS, sliding_window
from moe_jax.models.functions import make_model
from moe_jax.models.stack import empty_caches
from moe_jax.moe.layer import Batch
from moe_jax.plan import flops
from moe_jax.verify import shrink

SCALE = 0.4
WINDOW = {"model.attention": "sliding_window", "model.attentions.sliding_window.window": 3}


def seen_of(keys, num_keys):
    """The mask [B, T, S] of a run of keys."""
    key_11S = np.arange(num_keys)[None, None]
    own_BT = np.broadcast_to(np.arange(keys.first_BT.shape[1]), keys.first_BT.shape)
    last_BT = own_BT if isinstance(keys.last_BT, tuple) else keys.last_BT
    first_BT = np.asarray(keys.first_BT)
    return (key_11S >= first_BT[:, :, None]) & (key_11S <= np.asarray(last_BT)[:, :, None])


# Which keys are seen.


def test_a_window_worked_by_hand():
    """Two documents and padding, window 3: a token sees itself and two before it, in its own."""
    segment = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]])
    want = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(seen_of(windowed(segment, 3), 8)[0], want)


@pytest.mark.parametrize("window", [1, 4, 9, 20])
def test_a_window_is_that_of_mistral_in_transformers(window):
    seen = sliding_window_causal_mask_function(window)
    place = torch.arange(9)
    want = seen(0, 0, place[:, None], place[None])
    one = jnp.ones((1, 9), jnp.int32)
    np.testing.assert_array_equal(seen_of(windowed(one, window), 9)[0], want)


def test_slots_of_a_cache_are_the_keys_of_the_row():
    """Tokens at positions 4 and 6 of a row, in a cache of 9 slots, with window 3."""
    position = jnp.array([[4, 6]])
    options = sliding_window.Options(window=3)
    found = ATTENTIONS["sliding_window"].slots(position, position, 9, options)
    assert [np.flatnonzero(row).tolist() for row in found[0]] == [[2, 3, 4], [4, 5, 6]]


# The core, in blocks.


def rows(shape, seed=0):
    """(q, k, v), segments and a cotangent: several documents in a row, padding in the middle."""
    B, S, H, G, A = shape
    rng = np.random.default_rng(seed)
    lengths = rng.multinomial(S, [0.4, 0.1, 0.4, 0.1], size=B)
    segment = np.stack([np.repeat([1, 0, 2, 3], n) for n in lengths]).astype(np.int32)
    q, k, v, do = (jnp.asarray(rng.normal(size=(B, S, heads, A))) for heads in (H, G, G, H))
    return (q, k, v), jnp.asarray(segment), do


def plain(q, k, v, seen_BTS):
    """A softmax over all scores at once, of a mask; nothing where nothing is seen."""
    k, v = (jnp.repeat(z, q.shape[2] // k.shape[2], axis=2) for z in (k, v))
    score = jnp.einsum("bqha,bkha->bhqk", q, k) * SCALE
    weight = jax.nn.softmax(jnp.where(seen_BTS[:, None], score, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkha->bqha", jnp.where(seen_BTS[:, None], weight, 0), v)


def value_and_gradients(f, args, do):
    o, pull = jax.vjp(f, *args)
    return o, *pull(do)


@pytest.mark.parametrize("scores", [2**19, 1])
@pytest.mark.parametrize("window", [1, 5, 64, 100, 300])
def test_values_and_gradients_equal_a_masked_softmax(float64, monkeypatch, window, scores):
    monkeypatch.setattr(attention_parts, "SCORES", scores)
    args, segment, do = rows((2, 257, 4, 2, 4))
    place = np.arange(257)
    near = (place[:, None] >= place) & (place[:, None] - place < window)
    mine = np.asarray(segment)
    seen = near & (mine[:, :, None] == mine[:, None]) & (mine > 0)[:, :, None]

    def own(q, k, v):
        return attention(q, k, v, windowed(segment, window), scale=SCALE)

    def theirs(q, k, v):
        return plain(q, k, v, jnp.asarray(seen))

    got = jax.jit(lambda *args: value_and_gradients(own, args, do))(*args)
    want = jax.jit(lambda *args: value_and_gradients(theirs, args, do))(*args)
    for name, a, b in zip(("o", "q", "k", "v"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12, err_msg=name)


def test_keys_that_the_window_has_left_behind_are_not_computed():
    """The last of four blocks has queries 192 to 255. With window 33 they see keys from 160 on."""
    args, segment, _ = rows((1, 256, 2, 2, 4))

    def text(keys):
        run = jax.jit(lambda q, k, v: attention(q, k, v, keys, scale=SCALE))
        return run.trace(*args).lower(lowering_platforms=("cpu",)).as_text()

    assert "2x64x256" in text(causal(segment))
    short = text(windowed(segment, 33))
    assert "2x64x256" not in short and "2x64x96" in short


@pytest.mark.parametrize("window", [130, 2**40])
def test_a_window_as_long_as_the_row_is_the_causal_mask_bit_for_bit(window):
    args, segment, do = rows((2, 130, 4, 2, 4))
    args, do = (jax.tree.map(lambda z: z.astype(jnp.float32), z) for z in (args, do))

    def run(keys):
        def f(q, k, v):
            return attention(q, k, v, keys, scale=SCALE)

        return jax.jit(lambda *args: value_and_gradients(f, args, do))(*args)

    for a, b in zip(run(windowed(segment, window)), run(causal(segment)), strict=True):
        np.testing.assert_array_equal(a, b)


# Models.


@pytest.mark.full
@pytest.mark.usefixtures("standard_promotion")
def test_a_model_whose_window_is_the_row_trains_as_grouped_query(float64):
    """The attention has the same bits (above). Around it the compiler may fuse in another order."""
    window = WINDOW | {"model.attentions.sliding_window.window": 8}
    ours, theirs = (tiny.Program((1, 1, 1), c).run(2)[0] for c in (window, {}))
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("standard_promotion")
def test_a_model_trains_on_a_mesh_as_on_one_device(float64):
    changes = WINDOW | {"model.num_kv_heads": 2}
    (one, first), (many, _) = (
        tiny.Program(shape, changes).run(2) for shape in ((1, 1, 1), (2, 2, 2))
    )
    other, _ = tiny.Program((1, 1, 1), {}).run(2)
    flat_one, flat_many, flat_other = map(jax.tree.leaves, (one.params, many.params, other.params))
    for a, b in zip(flat_one, flat_many, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)
    # A window of 3 in rows of 8 is another model.
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(flat_one, flat_other, strict=True))
    assert np.isfinite(first[-1]["loss"])


def model_on_one_device(changes):
    """(mesh, the model bound to random parameters, its config) in the loop layout."""
    cfg = tiny.build(changes=changes).model
    mesh = meshes.make(1, 1, 1)
    with jax.set_mesh(mesh):
        model = make_model(cfg)
        params, state = jax.jit(model.init)(jax.random.key(0))
        # Biases and sinks begin at zero, where they could be forgotten.
        rng = np.random.default_rng(1)
        moved = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape), params)
        return mesh, model.bind(moved, state), cfg


def batch_of(id_BS, place_S, length_B, length):
    """Tokens of rows at places, as far as the rows have them; what is behind them is padding."""
    valid_BS = place_S[None] < length_B[:, None]
    position_BS = np.where(valid_BS, place_S[None], length)
    parts = {"id_BS": id_BS, "position_BS": position_BS, "segment_BS": valid_BS}
    placed = {name: meshes.put(z.astype(np.int32), "batch") for name, z in parts.items()}
    return Batch(**placed, row_B=meshes.put(np.arange(len(id_BS), dtype=np.int32), "batch"))


CACHED = [WINDOW | {"model.qk_norm": True}, *OPTIONS.values()]


# Every third one is in the normal suite.
@pytest.mark.parametrize("changes", normal(CACHED[::3], CACHED))
def test_decoding_with_a_cache_equals_the_full_pass(float64, changes):
    """Rows of 12 tokens and fewer in two pieces, then token by token, beyond a window of 3."""
    mesh, bound, cfg = model_on_one_device(changes)
    length, length_B = 12, np.array([12, 7, 1, 10])
    id_BS = np.random.default_rng(0).integers(0, 64, (4, length))
    pieces = [(0, 5), (5, 7), *((i, i + 1) for i in range(7, length))]
    with jax.set_mesh(mesh):
        whole = batch_of(id_BS, np.arange(length), length_B, length)
        full = np.asarray(jax.jit(lambda b: bound(b, jax.random.key(0), False)[0])(whole))
        cached, caches = jax.jit(bound.cached), empty_caches(cfg, 4, length)
        for first, last in pieces:
            place_S = np.arange(first, last)
            logits, caches = cached(
                batch_of(id_BS[:, first:last], place_S, length_B, length), caches
            )
            real = place_S[None] < length_B[:, None]
            want = full[:, first:last][real]
            np.testing.assert_allclose(np.asarray(logits)[real], want, atol=1e-11)


def test_what_a_token_is_told_of_reaches_back_a_window_less_one_a_block(float64):
    """Two blocks of window 3: the last token's logits depend on the 4 tokens before it, no more."""
    mesh, bound, _ = model_on_one_device(WINDOW | {"model.repeats": 2})
    id_BS = np.random.default_rng(0).integers(0, 64, (1, 10))
    place_S, length_B = np.arange(10), np.array([10])
    moved = []
    with jax.set_mesh(mesh):
        run = jax.jit(lambda b: bound(b, jax.random.key(0), False)[0][0, -1])
        base = np.asarray(run(batch_of(id_BS, place_S, length_B, 10)))
        for place in range(9):
            other = id_BS.copy()
            other[0, place] = (other[0, place] + 1) % 64
            change = np.asarray(run(batch_of(other, place_S, length_B, 10))) - base
            moved.append(bool(np.abs(change).max() > 1e-9))
    assert moved == [False] * 5 + [True] * 4


# Counts, labels, refusals.


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("length", [1, 5, 40])
def test_scores_are_counted_by_the_keys_that_are_seen(name, length):
    options = ATTENTIONS[name].options()
    if name == "sliding_window":
        options = sliding_window.Options(window=7)
    one = jnp.ones((1, length), jnp.int32)
    keys = ATTENTIONS[name].keys("causal", one, None, options)
    assert ATTENTIONS[name].num_pairs(length, options) == seen_of(keys, length).sum()


def test_flops_of_a_window():
    """8 tokens with window 3 see 1 + 2 + 6 x 3 = 21 keys, 36 without; 4 heads of width 4, 2 blocks,
    4 FLOPs a pair.
    """
    ours, theirs = (flops.forward_per_token(tiny.build(changes=c).model, 8) for c in (WINDOW, {}))
    assert ours.attention_scores == 2 * 4 * 4 * 4 * 21 // 8
    assert theirs.attention_scores == 2 * 4 * 4 * 4 * 36 // 8
    assert ours._replace(attention_scores=0) == theirs._replace(attention_scores=0)


def test_a_window_does_not_leak(float64):
    cfg = config.build(leak.shrink(tiny.raw(WINDOW | {"mesh.data": 1})), 1)
    assert cfg.model.attention_options.window == 3
    assert not any(causality.sees(cfg.model))
    measured = leak.measure(cfg, draws=2)
    assert all(found.delta == 0 for mode in leak.MODES for found in measured[mode])


def test_verify_keeps_a_window_that_short_rows_leave_behind():
    raw = tiny.raw({**WINDOW, "model.attentions.sliding_window.window": 64})
    small, found = shrink.shrink(raw)
    assert small["model"]["attention"] == "sliding_window"
    assert ("model.attentions.sliding_window.window", 64, 5) in [rule[:3] for rule in found]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.kinds.decoder.bidirectional_prefix": True, "task": "translation_prefix"},
            'model.attention = "sliding_window" has no mask "prefix", which model.kind = "decoder" '
            "asks for here: set model.attention=grouped_query",
        ),
        ({"model.kind": "encdec", "task": "translation"}, 'has no mask "full"'),
        ({"model.kind": "encoder", "task": "classification"}, 'has no mask "full"'),
        (
            {"model.period": ("depth:moe",), "model.allow_leak": True},
            "counts tokens that stand side by side, and a depth block has only some of them",
        ),
        ({"model.attentions.sliding_window.window": 0}, "window = 0 must be at least 1"),
        ({"model.num_kv_heads": 3}, "model.num_heads (4) must be divisible by model.num_kv_heads"),
    ],
)
def test_what_means_nothing_is_refused(changes, said):
    with pytest.raises(UserError) as error:
        tiny.build(changes=WINDOW | changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_encoder_with_a_causal_mask_may_have_a_window():
    chosen = {"model.kinds.encoder.attention": "causal", "model.kind": "encoder"}
    cfg = tiny.build(changes=WINDOW | chosen | {"task": "classification"})
    assert cfg.model.attention_options.window == 3


@pytest.mark.parametrize("kind", ["mmoe", "article"])
def test_a_kind_without_attention_refuses_the_choice(kind):
    raw = tiny.raw(WINDOW | {"model.kind": kind})
    with pytest.raises(UserError, match=f'does nothing, because model.kind = "{kind}" has no'):
        config.refuse_unchosen(raw, config_file.default_values())


def test_the_window_is_an_option_of_the_chosen_attention_alone():
    raw = tiny.raw({"model.attentions.sliding_window.window": 3})
    with pytest.raises(UserError, match=r'does nothing, because model\.attention is "grouped'):
        config.refuse_unchosen(raw, config_file.default_values())


def test_a_window_that_hides_nothing_is_told():
    wide = WINDOW | {"model.attentions.sliding_window.window": 8}
    (said,) = advice.notes(tiny.build(changes=wide))
    assert "window = 8 hides nothing in rows of data.seq_len = 8 tokens" in said
    assert not list(advice.notes(tiny.build(changes=WINDOW)))


def test_both_attentions_have_the_same_parameters(float64):
    """A run with a window begins from one without."""
    cfg = kind_config("decoder")
    window = dataclasses.replace(
        cfg, attention="sliding_window", attention_options=sliding_window.Options()
    )
    with jax.set_mesh(meshes.make(1, 1, 1)):
        ours, theirs = (
            jax.eval_shape(make_model(c).init, jax.random.key(0)) for c in (window, cfg)
        )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


def test_a_model_without_blocks_is_counted():
    """The article's model has none, so no block shares the residual stream."""
    article = tiny.build(changes={"model.kind": "article", "model.repeats": 0}).model
    for name in ATTENTIONS:
        options = ATTENTIONS[name].options()
        cfg = dataclasses.replace(article, attention=name, attention_options=options)
        assert set(ATTENTIONS[name].weights(cfg)) >= {"q", "o"}
    assert flops.parameters(article).attention == 0
