"""Decoding with a cache says what the uncached model says, whatever the batch, the mesh and the
layout.
"""

import dataclasses
import math
import random
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sample_cases import BOUNDARY, CONTEXT, VOCAB, model_config, one_device, values

from moe_jax.data.tokenizer import Tokenizer, bytes_tokenizer
from moe_jax.decoding import sample
from moe_jax.decoding.draw import dials, keep_likely
from moe_jax.decoding.sample import Row, RowState, Settings, make_sampler, split_at_stop
from moe_jax.errors import UserError
from moe_jax.models.decodable import with_dispatcher
from moe_jax.models.stack import empty_caches
from moe_jax.moe.layer import Batch
from moe_jax.parallel import mesh
from moe_jax.parallel.mesh import BATCH, P
from moe_jax.train_step import make_model

GREEDY = Settings(max_tokens=20, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop=())
HOT = GREEDY._replace(temperature=1.5, top_k=40, top_p=0.97, seed=3)


def make_tokenizer():
    """Token i is the character chr(33 + i), so that texts and ids are one to one."""
    pieces = (*(bytes([33 + i]) for i in range(BOUNDARY)), b"")

    def encode(texts):
        return [np.array([ord(c) - 33 for c in text], np.int32) for text in texts]

    return Tokenizer(
        "test",
        "bytes",
        BOUNDARY + 1,
        BOUNDARY,
        pieces,
        prefix_space=False,
        model=b"",
        encode_many=encode,
    )


class Small(NamedTuple):
    sampler: object
    values: tuple
    logits: object  # (id_BS, segment_BS) -> the logits of the model as it is trained, but dropless


@pytest.fixture(scope="module")
def small():
    cfg = model_config()
    with jax.set_mesh(one_device()):
        weights, model = values(cfg), make_model(with_dispatcher(cfg, "dropless"))

        @jax.jit
        def logits(id_BS, segment_BS):
            position_BS = jnp.broadcast_to(jnp.arange(id_BS.shape[1])[None], id_BS.shape)

            def place(x):
                return jax.sharding.reshard(x, P(BATCH))

            batch = Batch(*map(place, (id_BS, position_BS, segment_BS, jnp.arange(id_BS.shape[0]))))
            return model.bind(*weights)(batch, jax.random.key(0), False)[0]

        return Small(make_sampler(cfg, make_tokenizer(), CONTEXT), weights, logits)


def texts(small, prompts, settings, on_text=None):
    with jax.set_mesh(one_device()):
        return small.sampler(*small.values, prompts, settings, on_text)


def test_cached_logits_equal_uncached_logits(small):
    """Five rows' tokens in two pieces and then one at a time, the rows padded on the right, against
    one uncached pass.
    """
    cfg = dataclasses.replace(with_dispatcher(model_config(), "dropless"), scan=False)
    id_BS = np.random.default_rng(1).integers(0, VOCAB, (5, CONTEXT)).astype(np.int32)
    length_B = np.array([5, 32, 20, 9, 1])
    pieces = [(0, 9), (9, 18), *((i, i + 1) for i in range(18, 23))]
    with jax.set_mesh(one_device()):
        model = make_model(cfg)

        def place(x, *dims):
            return jax.sharding.reshard(jnp.asarray(x), P(BATCH, *dims))

        caches = empty_caches(cfg, 5, CONTEXT)

        @jax.jit
        def cached(caches, id_BS, place_S):
            valid_BS = place_S[None] < length_B[:, None]
            position_BS = jnp.where(valid_BS, place_S[None], CONTEXT)
            batch = Batch(
                *map(place, (id_BS, position_BS, valid_BS.astype(jnp.int32), jnp.arange(5)))
            )
            return model.bind(*small.values).cached(batch, caches)

        full = np.asarray(
            small.logits(id_BS, (np.arange(CONTEXT)[None] < length_B[:, None]).astype(np.int32))
        )
        for first, last in pieces:
            got, caches = cached(caches, id_BS[:, first:last], np.arange(first, last))
            real = np.arange(first, last)[None] < length_B[:, None]
            np.testing.assert_allclose(
                np.asarray(got)[real], full[:, first:last][real], rtol=0, atol=1e-5
            )


@pytest.mark.parametrize("prompt", ["", "HELLO", "LONG" * 20])
def test_greedy_is_the_argmax_of_the_uncached_model(small, prompt, caplog):
    """50 tokens pass the end of a context of 32 twice: each time the last half goes on as a new
    window.
    """
    tokenizer = make_tokenizer()
    window = [BOUNDARY, *tokenizer.encode(prompt)][-CONTEXT:]
    expected = []
    with jax.set_mesh(one_device()):
        while len(expected) < 50:
            id_BS, segment_BS = np.zeros((1, CONTEXT), np.int32), np.zeros((1, CONTEXT), np.int32)
            id_BS[0, : len(window)], segment_BS[0, : len(window)] = window, 1
            best = int(
                np.asarray(small.logits(id_BS, segment_BS))[
                    0, len(window) - 1, : tokenizer.vocab_size
                ].argmax()
            )
            assert best != BOUNDARY
            expected.append(best)
            window = [*window, best] if len(window) < CONTEXT else [*window, best][-CONTEXT // 2 :]
    assert texts(small, [prompt], GREEDY._replace(max_tokens=50)) == [tokenizer.decode(expected)]
    texts(small, [prompt], GREEDY)
    said = [r.getMessage() for r in caplog.records]
    cut = (
        "longer than the context of 32 tokens, so that the model sees only its end: "
        "prompt 1 (by 49)"
    )
    assert said == ([cut] if len(prompt) > CONTEXT else [])


def test_a_row_does_not_depend_on_its_batch(small):
    settings = HOT._replace(max_tokens=45)
    first = texts(small, ["SOME", "", "A.LONGER.ONE"], settings)
    again = texts(small, ["DIFFERENT", "", "ALSO"], settings)
    alone = texts(small, ["SOME"], settings)
    assert first[1] == again[1] and first[0] == alone[0]
    assert len(set(first + again)) == 5


@pytest.mark.parametrize("num_rows", [1, 4])
def test_no_step_copies_or_transposes_the_cache(num_rows):
    cfg = dataclasses.replace(model_config(), scan=False)
    with jax.set_mesh(one_device()):
        engine = sample.make_engine(cfg, make_tokenizer())
        weights = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
        caches = jax.eval_shape(lambda: engine.empty(num_rows, 64))
        numbers = jax.ShapeDtypeStruct((num_rows,), np.int32)
        rows = RowState(*(numbers for _ in RowState._fields))
        hlo = engine.decode.lower(weights, caches, rows, dials(HOT)).compile().as_text()
    sizes = {math.prod(array.shape) for array in jax.tree.leaves(caches)}
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", hlo)
    assert [dims for dims in made if math.prod(map(int, dims.split(","))) in sizes] == []


def test_caches_have_few_lengths_and_little_to_spare():
    lengths = [sample.cache_length(n) for n in (1, 48, 64, 65, 96, 97, 128, 160, 193, 257)]
    assert lengths == [64, 64, 64, 96, 96, 128, 128, 192, 256, 384]


def test_the_seed_and_the_row_decide_the_text(small):
    one = texts(small, ["SAME", "SAME", "SAME"], HOT)
    assert len(set(one)) == 3
    assert texts(small, ["SAME", "SAME", "SAME"], HOT) == one
    assert not set(texts(small, ["SAME", "SAME", "SAME"], HOT._replace(seed=4))) & set(one)


@pytest.mark.parametrize(
    "lengths",
    [
        mesh.Lengths(data=2, expert=2, model=2),
        # Rows are not split in decoding, experts are.
        pytest.param(mesh.Lengths(expert=2, seq=2, model=2), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_another_mesh_stacked_layers_and_shorter_loops_say_the_same(small, monkeypatch, lengths):
    prompts = ["ONE", "", "THREE.AND.MORE"]
    expected = [texts(small, prompts, settings) for settings in (GREEDY, HOT)]
    cfg = model_config(scan=True)
    monkeypatch.setattr(sample, "STEPS", 7)
    with jax.set_mesh(mesh.make(lengths)):
        sampler = make_sampler(cfg, make_tokenizer(), CONTEXT)
        weights = values(cfg)
        assert [sampler(*weights, prompts, settings) for settings in (GREEDY, HOT)] == expected


def test_a_row_ends_at_the_boundary_and_draws_no_token_without_text(small):
    """Nearly uniform: 3 of 64 ids are no token of the tokenizer, and decoding one would raise."""
    got = texts(small, ["A", "B", "C"], GREEDY._replace(temperature=50.0, max_tokens=150))
    assert min(map(len, got)) < 150 and max(map(len, got)) > 20


def test_more_prompts_than_a_batch_holds(small, monkeypatch):
    monkeypatch.setattr(sample, "ROWS", 3)
    prompts = [f"P{i}" for i in range(5)]
    assert [len(text) for text in texts(small, prompts, GREEDY)] == [20] * 5
    assert texts(small, prompts, HOT)[:3] == texts(small, prompts[:3], HOT)
    assert texts(small, [], HOT) == []


def test_streaming_gives_the_text_in_pieces_and_then_an_end(small):
    pieces = []
    got = texts(
        small,
        ["A", "B", "C"],
        HOT._replace(max_tokens=40),
        lambda row, text: pieces.append((row, text)),
    )
    for row, text in enumerate(got):
        mine = [piece for r, piece in pieces if r == row]
        assert len(mine) > len(text) / sample.STEPS and mine.index("") == len(mine) - 1
        assert "".join(mine) == text
    assert len(pieces) > 6


def test_a_stop_string_ends_the_text_before_it(small):
    whole = texts(small, ["A", "B", "C"], GREEDY)
    stop = whole[1][7:10]
    got = texts(small, ["A", "B", "C"], GREEDY._replace(stop=(stop, "never said")))
    assert got == [text.partition(stop)[0] for text in whole]
    assert got[1] == whole[1][: whole[1].index(stop)]


def test_stop_strings_do_not_depend_on_the_pieces():
    """Against the definition: the text ends where the first stop string is complete, and is cut
    where that one (the longest) begins.
    """
    source = random.Random(0)
    for _ in range(500):
        text = "".join(source.choices("ab", k=12))
        stop = tuple(
            "".join(source.choices("ab", k=source.randint(1, 4)))
            for _ in range(source.randint(0, 3))
        )
        ends = [(end, end - len(s)) for end in range(13) for s in stop if text[:end].endswith(s)]
        expected = text[: min(ends)[1]] if ends else text
        pieces = source.choice([list(text), [text], [text[:5], text[5:6], text[6:]]])
        shown, held, stopped = "", "", False
        for piece in pieces:
            certain, held, stopped = split_at_stop(held + piece, stop)
            shown += certain
            if stopped:
                break
        assert shown + held == expected and stopped == bool(ends)


def row_of(prompt, stop, pieces):
    row = Row(
        0,
        prompt,
        bytes_tokenizer(),
        100,
        GREEDY._replace(stop=stop, max_tokens=50),
        lambda _, text: pieces.append(text),
    )
    return row


def test_text_waits_for_the_rest_of_a_character_and_of_a_stop_string():
    pieces = []
    row = row_of("", ("END",), pieces)
    for ids in (b"\xc3", b"\xa9E", b"N", b"x E", b"ND and more"):
        row.take(list(ids))
    assert pieces == ["é", "ENx ", ""] and row.text == "éENx " and row.ended


@pytest.mark.parametrize("last", [[255], list(b"z" * 47)])
def test_what_waits_at_the_end_is_shown(last):
    """At the boundary, or when the 50 tokens are used up: half a stop string is text, half a
    character is U+FFFD.
    """
    row = row_of("", ("END",), [])
    row.take(list(b"aEN"))
    assert row.text == "a"
    row.take(last)
    assert row.ended and row.text == "aEN" + "z" * (len(last) - (last == [255]))
    row = row_of("", (), [])
    row.take([0xC3, 255])
    assert row.text == "\N{REPLACEMENT CHARACTER}"


def test_the_text_goes_on_from_the_prompt():
    """A tokenizer that puts a space before a text takes it off again only there."""
    pieces = (b" a", b" b", b"")

    def encode(texts):
        return [np.zeros(len(text), np.int32) for text in texts]

    spaced = Tokenizer(
        "test", "bytes", 3, 2, pieces, prefix_space=True, model=b"", encode_many=encode
    )
    for prompt, expected in (("a", " b"), ("", "b")):
        row = Row(0, prompt, spaced, 100, GREEDY, None)
        row.take([1])
        assert row.text == expected


def numpy_keep(logits, k, p):
    """Which tokens may be drawn, one after the other by falling logit."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: k or None]
    weight = {i: np.exp(np.float64(logits[i] - max(logits))) for i in order}
    kept, mass = set(), 0.0
    for i in order:
        if kept and mass >= p * sum(weight.values()):
            break
        kept.add(i)
        mass += weight[i]
    return kept


@pytest.mark.parametrize(
    ("k", "p"),
    [(0, 1.0), (1, 1.0), (5, 1.0), (99, 1.0), (0, 0.9), (0, 1e-6), (0, 0.3), (7, 0.8), (3, 0.2)],
)
def test_top_k_and_top_p_keep_what_the_definition_keeps(k, p):
    logits_BV = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32) * 3
    got = np.asarray(keep_likely(logits_BV, jnp.int32(k), jnp.float32(p)))
    for row, logits in zip(got, logits_BV):
        kept = numpy_keep(logits, k, p)
        assert set(np.flatnonzero(np.isfinite(row))) == kept
        assert all(row[i] == logits[i] for i in kept)


def test_tokens_are_drawn_with_their_probability():
    logits, rows = np.array([0.0, 1.0, 2.0, -jnp.inf, 0.5], np.float32), 20_000
    dials = sample.dials(GREEDY._replace(temperature=0.7, top_p=0.95))
    index = np.arange(rows, dtype=np.int32)
    got = sample.draw(np.tile(logits, (rows, 1)), index, np.zeros_like(index), dials)
    # exp(x / 0.7) = 1, 4.17, 17.4, 0, 2.04 of 24.6: without the first (4 %), the other three reach
    # 95.9 %.
    weight = np.exp(logits / 0.7) * [0, 1, 1, 1, 1]
    np.testing.assert_allclose(
        np.bincount(got, minlength=5) / rows, weight / weight.sum(), atol=0.01
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(max_tokens=0), "max_tokens = 0 must be at least 1"),
        (dict(temperature=-0.5), r"temperature = -0.5 must be at least 0 \(0 is greedy\)"),
        (dict(temperature=float("nan")), "temperature = nan must be"),
        (dict(top_k=-1), "top_k = -1 must be at least 0"),
        (dict(top_p=0.0), "top_p = 0.0 must be above 0 and at most 1"),
        (dict(top_p=1.5), "top_p = 1.5 must be above 0 and at most 1"),
        (dict(seed=-1), "seed = -1 must be at least 0"),
        (dict(stop=("a", "")), "stop = '' is in every text"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        sample.check(GREEDY._replace(**change))
