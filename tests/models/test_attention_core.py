"""Attention against a NumPy loop over queries and against JAX's own, on packed rows, on one device
and eight.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import as_cache
from jax.sharding import PartitionSpec as P

from moe_jax.models import attention_chunks, attention_core, attention_parts
from moe_jax.models.attention_core import (
    across,
    attention,
    causal,
    decode_attention,
    full,
    prefix,
    windowed,
)
from moe_jax.parallel.compiling import QUICK, of_other_platforms
from moe_jax.schema.config import ModelConfig

SCALE = 0.4
# B, S, H, G, A: blocks and groups of the CPU's kernel come with S >= 128 and more scores than fit
SHAPES = {
    "tiny": (2, 7, 4, 2, 4),
    "one token": (1, 1, 2, 1, 2),
    "two blocks": (1, 130, 2, 2, 4),
    "four uneven blocks": (1, 257, 4, 2, 4),
}


def make(shape, dtype=np.float64, seed=0):
    """q, k, v, segments (several per row, padding in the middle and at the end) and a cotangent."""
    B, S, H, G, A = shape
    rng = np.random.default_rng(seed)

    def draw(heads):
        return jnp.asarray(rng.normal(size=(B, S, heads, A)), dtype)

    lengths = rng.multinomial(S, [0.3, 0.2, 0.1, 0.3, 0.1], size=B)
    segment = np.stack([np.repeat([1, 2, 0, 3, 0], n) for n in lengths])
    return (draw(H), draw(G), draw(G), jnp.asarray(segment, jnp.int32)), draw(H)


def loop_attention(q, k, v, segment):
    """One query at a time."""
    out, r = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(q.shape[:3]):
        if segment[b, i] > 0:
            seen = np.flatnonzero(segment[b, : i + 1] == segment[b, i])
            score = k[b, seen, h // r] @ q[b, i, h] * SCALE
            weight = np.exp(score - score.max())
            out[b, i, h] = weight @ v[b, seen, h // r] / weight.sum()
    return out


def masked_softmax(q, k, v, segment):
    """All scores at once, in a form that is differentiated by JAX."""
    r = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(z, r, axis=2) for z in (k, v))
    seen = (segment[:, :, None] == segment[:, None]) & jnp.tri(q.shape[1], dtype=bool)[None]
    score = jnp.einsum("bqha,bkha->bhqk", q, k) * SCALE
    weight = jax.nn.softmax(jnp.where(seen[:, None], score, -1e30), axis=-1)
    out = jnp.einsum("bhqk,bkha->bqha", weight, v)
    return jnp.where(segment[:, :, None, None] > 0, out, 0)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(f, args, do):
    q, k, v, segment = args
    o, pull = jax.vjp(lambda q, k, v: f(q, k, v, segment), q, k, v)
    return o, *pull(do)


def own(q, k, v, segment):
    return attention(q, k, v, causal(segment), scale=SCALE)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 48 tokens, which do not divide a row, on every platform."""
    monkeypatch.setattr(attention_chunks, "CHUNK_ON_CPU", 48)
    monkeypatch.setattr(attention_chunks, "chunk_tokens", lambda num_heads: 48)


def assert_near(got, want, tolerance):
    for name, a, b in zip(("o", "q", "k", "v"), got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("name", ["tiny", "two blocks"])
def test_equals_a_loop_over_queries(name, float64):
    args, _ = make(SHAPES[name])
    got = jax.jit(own)(*args)
    np.testing.assert_allclose(got, loop_attention(*(np.asarray(z) for z in args)), atol=1e-13)


@pytest.mark.parametrize("scores", [2**19, 1])
@pytest.mark.parametrize("name", ["tiny", "two blocks", "four uneven blocks"])
def test_chunks_equal_a_masked_softmax(name, scores, float64, monkeypatch, small_chunks):
    """On a CPU, in parts of heads; and all at once, as other platforms have it."""
    monkeypatch.setattr(attention_parts, "SCORES", scores)
    args, do = make(SHAPES[name])
    want = value_and_gradient(masked_softmax, args, do)

    def chunks(q, k, v, segment):
        return attention(q, k, v, causal(segment), scale=SCALE, kernel="chunks")

    for got in (
        value_and_gradient(chunks, args, do),
        on_other_platforms(lambda *a: own(*a), args, do),
    ):
        assert_near(got, want, 1e-12)
        padding = np.asarray(args[3]) == 0
        assert all(not np.any(np.asarray(z)[padding]) for z in got)


def on_other_platforms(f, args, do):
    with of_other_platforms():
        return value_and_gradient(f, args, do)


@pytest.mark.parametrize("window", [1, 60])
def test_chunks_of_a_window_equal_its_blocks(window, float64, small_chunks):
    (q, k, v, segment), do = make(SHAPES["four uneven blocks"])

    def of(kernel):
        return lambda q, k, v, s: attention(
            q, k, v, windowed(s, window), scale=SCALE, kernel=kernel
        )

    got, want = (value_and_gradient(of(z), (q, k, v, segment), do) for z in ("chunks", "blocks"))
    assert_near(got, want, 1e-12)


def test_pairs_that_are_masked_entirely_are_not_computed():
    def pairs(*args):
        return attention_chunks.pairs_seen(*args)

    assert pairs(3, 3, (4, 4), True, None) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    # A query sees four tokens before it, so the first of a chunk reaches the chunk before.
    assert pairs(3, 3, (4, 4), True, 5) == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]
    assert pairs(3, 3, (4, 4), True, 1) == [(0, 0), (1, 1), (2, 2)]
    assert len(pairs(3, 5, (4, 4), False, None)) == 15
    # Every pair that is left out is masked, and every other one is not.
    for window in (None, 1, 2, 5, 9):
        query, key = np.arange(24)[:, None], np.arange(24)[None]
        seen = (key <= query) & (key > query - (window or 24))
        some = {(i // 4, j // 6) for i, j in np.argwhere(seen)}
        assert set(pairs(6, 4, (4, 6), True, window)) == some


def test_chunks_are_smaller_where_there_are_many_heads():
    assert attention_chunks.chunk_tokens(16) == 512
    assert attention_chunks.chunk_tokens(1024) == 256
    assert attention_chunks.chunk_tokens(10**9) == 128


def test_the_config_names_every_kernel():
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    declared = fields["attention_kernel"].metadata["option"]
    names = attention_core.BY_PLATFORM, *attention_core.KERNELS, *attention_core.OF_JAX
    assert declared.choices == names


@pytest.mark.parametrize(
    ("mask", "cap"), [("causal", 0.0), ("windowed", 0.0), ("full", 0.0), ("windowed", 0.5)]
)
def test_splash_attention_equals_chunks(mask, cap):
    """Interpreted: two blocks of a row, several segments, grouped queries, padding."""
    (q, k, v, segment), do = make((2, 256, 4, 2, 128), np.float32)
    visible = {"causal": causal, "windowed": lambda s: windowed(s, 70), "full": full}[mask]

    def of(kernel):
        how = {"scale": 0.1, "cap": cap, "kernel": kernel}
        return lambda q, k, v, s: attention(q, k, v, visible(s), **how)

    got, want = (value_and_gradient(of(z), (q, k, v, segment), do) for z in ("splash", "chunks"))
    assert_near(got, want, 2e-4)


@pytest.mark.parametrize("mask", ["causal", "full"])
def test_triton_attention_equals_chunks(mask):
    """Interpreted, as above; its heads are no wider than they must be."""
    (q, k, v, segment), do = make((2, 256, 4, 2, 24), np.float32)
    visible = {"causal": causal, "full": full}[mask]

    def of(kernel):
        return lambda q, k, v, s: attention(q, k, v, visible(s), scale=0.1, kernel=kernel)

    got, want = (value_and_gradient(of(z), (q, k, v, segment), do) for z in ("triton", "chunks"))
    assert_near(got, want, 2e-4)


@pytest.mark.parametrize("kernel", attention_core.OF_JAX)
def test_what_a_kernel_of_jax_cannot_say_is_computed_by_chunks(kernel):
    (q, k, v, segment), _ = make((1, 256, 2, 2, 128), np.float32)

    def of(rows, keys, **more):
        args = (z[:, :rows] for z in (q, k, v))
        how = {"scale": 0.1, "kernel": kernel, **more}
        return "pallas_call" in str(jax.make_jaxpr(lambda *a: attention(*a, keys, **how))(*args))

    assert of(256, causal(segment))
    # The shortest block is 128 tokens.
    assert not of(200, causal(segment[:, :200]))
    assert not of(256, prefix(segment, segment == 1))
    assert not of(256, across(segment, segment))
    knows_windows = kernel == "splash"
    assert of(256, windowed(segment, 70)) == knows_windows
    assert of(256, causal(segment), cap=0.5) == knows_windows


@pytest.mark.parametrize("platform", ["cpu", "others"])
def test_memory_of_long_rows_is_linear(platform):
    """Of a step through attention: twice the row, twice the memory; the scores would be 4 times."""

    def temporary(S):
        q = jax.ShapeDtypeStruct((1, S, 2, 16), jnp.float32)
        segment = jax.ShapeDtypeStruct((1, S), jnp.int32)

        def run(q, k, v, segment, do):
            return value_and_gradient.__wrapped__(own, (q, k, v, segment), do)

        compiled = jax.jit(run).lower(q, q, q, segment, q).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    if platform == "cpu":
        short, long = temporary(4096), temporary(8192)
    else:
        with of_other_platforms():
            short, long = temporary(4096), temporary(8192)
    # The scores of one head alone.
    assert long < 2.2 * short and long < 4 * 8192**2 / 4


@pytest.mark.parametrize(
    "scores", [2**19, 1]
)  # 1: every group is as small as it may be, so that there are several
@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient_equal_a_masked_softmax(name, scores, float64, monkeypatch):
    args, do = make(SHAPES[name])
    monkeypatch.setattr(attention_parts, "SCORES", scores)
    got = value_and_gradient(lambda *a: own(*a), args, do)
    assert_near(got, value_and_gradient(masked_softmax, args, do), 1e-12)
    padding = np.asarray(args[3]) == 0
    assert all(not np.any(np.asarray(z)[padding]) for z in got)  # exactly zero, and no gradient


def test_several_groups_are_really_run(float64, monkeypatch):
    """Four rows of two key heads are 8 heads: 2 groups where 4 fit."""
    args, do = make((4, 130, 4, 2, 4))
    want = value_and_gradient(masked_softmax, args, do)

    def program():
        def blocks(q, k, v, segment):
            return attention(q, k, v, causal(segment), scale=SCALE, kernel="blocks")

        return str(jax.make_jaxpr(blocks)(*args))

    assert "scan" not in program()
    monkeypatch.setattr(attention_parts, "SCORES", 1)
    assert "length=2" in program()
    assert_near(value_and_gradient(lambda *a: own(*a), args, do), want, 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.1)])
def test_narrow_dtypes_stay_near_and_keep_their_dtype(dtype, tolerance):
    args, do = make(SHAPES["two blocks"], dtype)
    with jax.numpy_dtype_promotion("strict"):
        got = value_and_gradient(own, args, do)
    assert [z.dtype for z in got] == [dtype] * 4
    wide = jax.tree.map(lambda z: z.astype(jnp.float32) if z.dtype == dtype else z, (args, do))
    assert_near(got, value_and_gradient(masked_softmax, *wide), tolerance)


def test_equals_jax_on_one_segment():
    (q, k, v, _), do = make((2, 66, 4, 2, 8), np.float32)
    one = jnp.ones((2, 66), jnp.int32)

    def theirs(q, k, v, _):
        return jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=True)

    args = (q, k, v, one)
    assert_near(value_and_gradient(own, args, do), value_and_gradient(theirs, args, do), 2e-5)


def test_scores_of_any_size_give_finite_results():
    (q, k, v, segment), do = make(SHAPES["two blocks"], np.float32)
    for array in value_and_gradient(own, (q * 1e4, k * 1e4, v, segment), do):
        assert np.all(np.isfinite(array))


def test_inside_checkpoint_and_scan(float64):
    args, do = make(SHAPES["two blocks"])

    def layers(f, q, k, v, segment):
        body = jax.checkpoint(lambda q, scale: (q + f(q, k * scale, v, segment), None))
        return jax.lax.scan(body, q, jnp.array([1.0, 0.5]))[0]

    got, want = (
        value_and_gradient(functools.partial(layers, f), args, do) for f in (own, masked_softmax)
    )
    assert_near(got, want, 1e-12)


@pytest.mark.parametrize("sharded_keys", [True, False])
def test_on_a_mesh_equals_one_device(sharded_keys, float64):
    """Rows over data and expert, query heads over model; key heads over model too, or one for all
    devices.
    """
    shape = (4, 130, 4, 2 if sharded_keys else 1, 4)
    args, do = make(shape)
    want = value_and_gradient(masked_softmax, args, do)
    mesh = jax.make_mesh((2, 2, 2), ("data", "expert", "model"))
    batch = ("data", "expert")
    heads, segments = P(batch, None, "model"), P(batch)
    specs = (heads, *[heads if sharded_keys else P(batch)] * 2, segments)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(z, s) for z, s in zip(args, specs)]
        parallel = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=heads)
        got = value_and_gradient(parallel, placed, jax.device_put(do, heads))
    assert_near(got, want, 1e-12)


def test_the_kernel_is_chosen_by_the_platform_compiled_for():
    args, do = make((4, 256, 4, 4, 4), np.float32)
    step = jax.jit(lambda q, k, v, s, do: jax.vjp(lambda *a: own(*a, s), q, k, v)[1](do))
    text = {
        p: step.trace(*args, do).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "tpu")
    }
    assert "16x256x256" in text["tpu"] and "x192x" not in text["tpu"]
    assert "x192x64" in text["cpu"]  # the third block of queries and the keys before its end


@pytest.mark.parametrize("first", [5, 6], ids=["two queries", "one query"])
@pytest.mark.parametrize("num_key_heads", [2, 4])
def test_decoding_equals_the_last_rows_of_attention(first, num_key_heads, float64):
    """Queries 5 and 6, or 6 alone, against a cache of 9 places, two of them unused."""
    (q, k, v, _), _ = make((2, 7, 4, num_key_heads, 4))
    want = masked_softmax(q, k, v, jnp.ones((2, 7), jnp.int32))[:, first:]

    def pad(z):
        return jnp.pad(z, ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=1e3)

    mask = jnp.arange(9)[None, None] <= jnp.arange(first, 7)[None, :, None]
    mask = jnp.broadcast_to(mask, (2, 7 - first, 9))
    got = decode_attention(q[:, first:], *as_cache(pad(k), pad(v)), mask, scale=SCALE)
    np.testing.assert_allclose(got, want, atol=1e-13)


@pytest.mark.parametrize("width", [1, 8, 9, 30, attention_core.MOST_TERMS + 1])
def test_products_with_all_slots_are_those_of_matrices(width, float64):
    rng = np.random.default_rng(0)
    q_NQA, k_NAS = rng.standard_normal((6, 1, width)), rng.standard_normal((6, width, 5))
    got = attention_core._of_slots(jnp.asarray(q_NQA), jnp.asarray(k_NAS), jnp.float64)
    np.testing.assert_allclose(got, q_NQA @ k_NAS, atol=1e-12)


def test_decoding_with_nothing_to_see_gives_zero_in_the_dtype_of_the_query():
    (q, k, v, _), _ = make((2, 3, 4, 2, 4), jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        got = decode_attention(q, *as_cache(k, v), jnp.zeros((2, 3, 3), bool), scale=SCALE)
    assert got.dtype == jnp.bfloat16 and not np.any(got)


# Other masks: each against a plain softmax over a boolean mask, written without runs.


def plain(q, k, v, seen_BTS):
    """Softmax over the keys that are seen; nothing where none is."""
    k, v = (jnp.repeat(z, q.shape[2] // k.shape[2], axis=2) for z in (k, v))
    score = jnp.where(seen_BTS[:, None], jnp.einsum("bqha,bkha->bhqk", q, k) * SCALE, -jnp.inf)
    top = jnp.maximum(score.max(-1, keepdims=True), -1e30)
    weight = jnp.exp(score - jax.lax.stop_gradient(top))
    weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-300)
    return jnp.einsum("bhqk,bkha->bqha", weight, v)


def seen_full(segment):
    return (segment[:, :, None] == segment[:, None]) & (segment > 0)[:, :, None]


def seen_prefix(segment, prefix):
    both = prefix[:, :, None] & prefix[:, None]
    return seen_full(segment) & (both | np.tri(segment.shape[1], dtype=bool)[None])


def seen_across(segment, source):
    return (segment > 0)[:, :, None] & (source > 0)[:, None]


def mask_case(name, shape):
    """(arguments of attention but for its keys, cotangent, keys, mask): the first tokens of every
    segment are its prefix.
    """
    (q, k, v, segment), do = make(shape)
    segment = np.asarray(segment)
    if name == "full":
        return (q, k, v), do, full(segment), seen_full(segment)
    if name == "prefix":
        begins = np.cumsum(np.diff(segment, axis=1, prepend=-1) != 0, 1)
        place = np.stack(
            [[np.sum(row[: i + 1] == row[i]) for i in range(len(row))] for row in begins]
        )
        mine = (place <= 1 + begins % 7) & (segment > 0)
        return (q, k, v), do, prefix(segment, mine), seen_prefix(segment, mine)
    rng, B, S = np.random.default_rng(1), *segment.shape
    length = rng.integers(0, S + 6, B)
    length[-1] = 0  # a row without any source
    source = (np.arange(S + 5)[None] < length[:, None]).astype(np.int32)
    k, v = (jnp.asarray(rng.normal(size=(B, S + 5, *z.shape[2:]))) for z in (k, v))
    return (q, k, v), do, across(segment, source), seen_across(segment, source)


@pytest.mark.parametrize(("kernel", "scores"), [("blocks", 2**19), ("blocks", 1), ("chunks", 1)])
@pytest.mark.parametrize("shape", ["tiny", "one token", "two blocks", "four uneven blocks"])
@pytest.mark.parametrize("name", ["full", "prefix", "across"])
def test_masks_equal_a_plain_softmax(
    name, shape, kernel, scores, float64, monkeypatch, small_chunks
):
    monkeypatch.setattr(attention_parts, "SCORES", scores)
    args, do, keys, seen = mask_case(name, SHAPES[shape])

    def both(f, *keys):
        o, pull = jax.vjp(lambda q, k, v: f(q, k, v, *keys), *args)
        return o, *pull(do)

    got = jax.jit(lambda keys: both(lambda *a: attention(*a, scale=SCALE, kernel=kernel), keys))(
        keys
    )
    assert_near(got, jax.jit(lambda seen: both(plain, seen))(seen), 1e-12)
    nothing = ~seen.any(2)
    assert not np.any(np.asarray(got[0])[nothing]) and not np.any(np.asarray(got[1])[nothing])


def test_prefix_worked_by_hand(float64):
    """A row "a b | c d" and padding, equal scores: a and b see a and b; c sees a, b, c; d sees all
    four.
    """
    v = jnp.asarray([1.0, 2, 4, 8, 16]).reshape(1, 5, 1, 1)
    zero, segment = jnp.zeros((1, 5, 1, 1)), jnp.array([[1, 1, 1, 1, 0]])
    keys = prefix(segment, jnp.array([[True, True, False, False, False]]))
    o = attention(zero, zero, v, keys, scale=1.0)
    np.testing.assert_allclose(o[0, :, 0, 0], [3 / 2, 3 / 2, 7 / 3, 15 / 4, 0])


@pytest.mark.parametrize("remat", [True, False])
def test_memory_of_layers_in_a_loop_is_linear_in_the_tokens_of_a_row(remat):
    """Masks depend on nothing that changes from layer to layer: they must not be kept for all pairs
    of chunks.
    """

    def temporary(S):
        def layer(x_1SD, w_D, keys):
            q_1SHA = (x_1SD * w_D[None, None]).reshape(1, S, 4, 8)
            o_1SHA = attention(q_1SHA, q_1SHA, q_1SHA, keys, scale=0.3, kernel="chunks")
            return x_1SD + o_1SHA.reshape(x_1SD.shape)

        def loss(w_LD, x_1SD, segment_1S):
            keys = causal(segment_1S)
            call = jax.checkpoint(layer) if remat else layer

            def body(x_1SD, w_D):
                return call(x_1SD, w_D, keys), None

            return jax.lax.scan(body, x_1SD, w_LD)[0].sum()

        shapes = ((2, 32), jnp.float32), ((1, S, 32), jnp.float32), ((1, S), jnp.int32)
        inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        compiled = jax.jit(jax.grad(loss)).lower(*inputs).compile(compiler_options=QUICK)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) < 2.2 * temporary(2048)
