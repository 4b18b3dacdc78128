"""T5's relative position bias: buckets as in transformers, every kernel against a plain softmax,
and what the blocks of a stack share. tests/interchange compares whole models with transformers.
"""

import functools

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
import torch
from attention_cases import as_cache
from block_options import OPTIONS
from transformers.models.t5.modeling_t5 import T5Attention

from moe_jax.checkpoint import flat
from moe_jax.errors import UserError
from moe_jax.models import attention_chunks, attention_parts
from moe_jax.models.attention_bias import Buckets
from moe_jax.models.attention_core import attention, causal, decode_attention, full, prefix
from moe_jax.models.functions import make_model
from moe_jax.parallel.compiling import of_other_platforms
from moe_jax.verify import alone

SCALE = 0.4
B, S, A = 2, 70, 4
AT = "model.attentions.relative_bias"
T5 = OPTIONS["T5, Switch"]


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize(
    ("number", "max_distance"), [(32, 128), (8, 20), (6, 5), (4, 3), (64, 500)]
)
def test_buckets_are_those_of_transformers(number, max_distance, both_ways):
    buckets = Buckets(number, max_distance, both_ways)
    distance = np.arange(-700, 701)
    want = T5Attention._relative_position_bucket(
        torch.tensor(distance),
        bidirectional=both_ways,
        num_buckets=number,
        max_distance=max_distance,
    )
    np.testing.assert_array_equal(buckets.of(jnp.asarray(distance)), want)


def test_buckets_worked_by_hand():
    """Eight of one direction up to 16 tokens: 0 to 3 have their own, then 4 e^(x log(4) / 4)."""
    buckets = Buckets(8, 16, False)
    distances = -np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 15, 16, 99])
    assert buckets.of(jnp.asarray(distances)).tolist() == [
        *(0, 1, 2, 3),
        *(4, 4, 5, 5, 6, 6, 7, 7, 7, 7),
    ]
    # A later key is as far as the token itself.
    assert buckets.of(jnp.asarray([1, 50])).tolist() == [0, 0]


def draw(r, number, seed=0):
    """(q, k, v, bias), segments with padding in the middle, tokens of a prefix, a cotangent."""
    rng = np.random.default_rng(seed)
    G = 2
    segment = np.stack([np.repeat([1, 0, 2, 3], n) for n in ([30, 5, 20, 15], [1, 9, 50, 10])])
    shapes = ((B, S, G * r, A), (B, S, G, A), (B, S, G, A), (number, G * r), (B, S, G * r, A))
    *args, do = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    # The first 12 tokens of the second document.
    prefix_BS = np.zeros((B, S), bool)
    prefix_BS[0, 35:47] = prefix_BS[1, 10:22] = True
    return args, jnp.asarray(segment.astype(np.int32)), jnp.asarray(prefix_BS), do


def plain(q, k, v, bias_LH, seen_BTS, buckets):
    """A softmax over all scores and their biases at once."""
    r = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(z, r, axis=2) for z in (k, v))
    place = jnp.arange(S)
    added_TSH = bias_LH[buckets.of(place[None] - place[:, None])]
    score = jnp.einsum("bqha,bkha->bhqk", q, k) * SCALE + added_TSH.transpose(2, 0, 1)[None]
    weight = jax.nn.softmax(jnp.where(seen_BTS[:, None], score, -1e30), axis=-1)
    return jnp.einsum("bhqk,bkha->bqha", jnp.where(seen_BTS[:, None], weight, 0), v)


def seen_by(mask, segment, prefix_BS):
    """Which keys each query sees, bool [B, T, S]."""
    place, mine = np.arange(S), np.asarray(segment)
    same = (mine[:, :, None] == mine[:, None]) & (mine > 0)[:, :, None]
    earlier = (place[:, None] >= place)[None]
    if mask == "full":
        return same
    both = np.asarray(prefix_BS)[:, :, None] & np.asarray(prefix_BS)[:, None]
    return same & (earlier | both) if mask == "prefix" else same & earlier


def keys_of(mask, segment, prefix_BS):
    if mask == "prefix":
        return prefix(segment, prefix_BS)
    return {"causal": causal, "full": full}[mask](segment)


def value_and_gradients(f, args, do):
    o, pull = jax.vjp(f, *args)
    return o, *pull(do)


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("mask", ["causal", "full", "prefix"])
def test_every_kernel_equals_a_plain_softmax(float64, monkeypatch, mask, r):
    """Blocks and chunks that do not divide a row, in parts of heads, and as other platforms do."""
    monkeypatch.setattr(attention_chunks, "CHUNK_ON_CPU", 32)
    monkeypatch.setattr(attention_chunks, "chunk_tokens", lambda num_heads: 32)
    buckets = Buckets(8, 20, mask != "causal")
    args, segment, prefix_BS, do = draw(r, buckets.number)
    seen = jnp.asarray(seen_by(mask, segment, prefix_BS))

    def ours(kernel, q, k, v, bias_LH):
        keys = keys_of(mask, segment, prefix_BS)
        more = {"scale": SCALE, "buckets": buckets, "bias_LH": bias_LH, "kernel": kernel}
        return attention(q, k, v, keys, **more)

    def theirs(q, k, v, bias_LH):
        return plain(q, k, v, bias_LH, seen, buckets)

    def run(f):
        return jax.jit(lambda *args: value_and_gradients(f, args, do))(*args)

    want = run(theirs)
    assert min(np.abs(z).max() for z in want) > 0.01
    found = {}
    for scores in (2**19, 1):
        monkeypatch.setattr(attention_parts, "SCORES", scores)
        for kernel in ("blocks", "chunks"):
            found[kernel, scores] = run(functools.partial(ours, kernel))
    with of_other_platforms():
        found["others"] = run(functools.partial(ours, "auto"))
    for where, got in found.items():
        for name, a, b in zip(("o", "q", "k", "v", "bias"), got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12, err_msg=f"{where}, {name}")


def test_splash_attention_leaves_a_bias_to_the_other_kernels():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 128, 2, 128)), jnp.float32) for _ in range(3))
    more = {"buckets": Buckets(8, 20, False), "bias_LH": jnp.asarray(rng.normal(size=(8, 2)))}
    keys = causal(jnp.ones((1, 128), jnp.int32))
    have, want = (
        attention(q, k, v, keys, scale=0.1, kernel=kernel, **more) for kernel in ("splash", "auto")
    )
    np.testing.assert_array_equal(have, want)


def test_a_bias_of_the_last_bucket_is_that_of_all_further_keys(float64):
    """Its number moves the score of what is 16 tokens back or more, and of nothing else: where a
    document has no such keys its gradient is zero.
    """
    buckets = Buckets(8, 16, False)
    (q, k, v, bias_LH), _, _, do = draw(1, 8)
    for length, reached in ((12, False), (40, True)):
        place = np.arange(S)
        segment = jnp.asarray(np.tile(place // length + 1, (B, 1)).astype(np.int32))

        def value(bias_LH, segment=segment):
            o = attention(q, k, v, causal(segment), scale=1.0, buckets=buckets, bias_LH=bias_LH)
            return (o * do).sum()

        gradient_LH = jax.jit(jax.grad(value))(bias_LH)
        assert (np.abs(gradient_LH[7]).max() > 1e-3) == reached
        assert np.abs(gradient_LH[:6]).min() > 1e-6


def test_decoding_adds_the_same(float64):
    """Three tokens at places of their own in each row, against a cache of all keys."""
    buckets = Buckets(6, 9, True)
    (q, k, v, bias_LH), _, _, _ = draw(3, 6)
    everything = jnp.ones((B, S, S), bool)
    want = plain(q, k, v, bias_LH, everything, buckets)
    position_Bq = jnp.asarray([[3, 40, 69], [0, 1, 22]], jnp.int32)
    row_B1 = np.arange(B)[:, None]
    more = {"scale": SCALE, "buckets": buckets, "bias_LH": bias_LH, "position_Bq": position_Bq}
    got = decode_attention(q[row_B1, position_Bq], *as_cache(k, v), everything[:, :3], **more)
    np.testing.assert_allclose(got, want[row_B1, position_Bq], atol=1e-12)


# Models.


def names_of(changes):
    """{name: shape} of the parameters of a config."""
    with jax.set_mesh(meshes.make(1, 1, 1)):
        params, _ = jax.eval_shape(
            make_model(tiny.build(changes=changes).model).init, jax.random.key(0)
        )
    return {name: x.shape for name, x in flat.flatten(params).items()}


def test_the_blocks_of_a_stack_share_one_table(float64):
    assert names_of(T5)["shared/relative_bias"] == (6, 4)
    assert not any("shared/" in name for name in names_of({}))
    both = names_of(T5 | {"model.kind": "encdec", "task": "translation"})
    tables = [name for name in both if "relative_bias" in name]
    assert sorted(tables) == ["encoder/shared/relative_bias", "shared/relative_bias"]
    some = {"model.period": ("relative_bias:moe", "moe"), "model.attention": "grouped_query"}
    assert "shared/relative_bias" in names_of(T5 | some | {f"{AT}.buckets": 8})


def test_other_first_values_stay_as_they_were(float64):
    """A model that shares nothing draws what it drew, and one that does draws the same besides."""
    values = []
    for changes in ({}, {"model.attention": "relative_bias"}):
        with jax.set_mesh(meshes.make(1, 1, 1)):
            model = make_model(tiny.build(changes=changes).model)
            values.append(flat.flatten(jax.jit(model.init)(jax.random.key(0))[0]))
    plain, biased = values
    assert set(biased) - set(plain) == {"shared/relative_bias"}
    assert np.asarray(biased["shared/relative_bias"]).std() == pytest.approx(16**-0.5, rel=0.3)
    for name, value in plain.items():
        np.testing.assert_array_equal(value, biased[name])


@pytest.mark.full
def test_verify_compares_kernels_with_the_bias_of_the_model(float64):
    kinds = {"model.kind": "encdec", "task": "translation"}
    for changes in (T5, T5 | kinds):
        check = alone.attention(96, tiny.build(changes=changes).model)
        assert check.sound and check.value > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {f"{AT}.max_distance": 3},
            f"{AT}.max_distance (3) must be above 3: with {AT}.buckets = 6, so many distances "
            "have a bucket of their own",
        ),
        ({f"{AT}.buckets": 3}, f"{AT}.buckets = 3 must be at least 4"),
        ({"model.attention_cap": 2.0}, "model.attention_cap (2.0) must be 0 with model.attention"),
        (
            {"model.period": ("depth:moe",), "model.allow_leak": True},
            "counts tokens that stand side by side, and a depth block has only some of them",
        ),
        ({"model.rope_theta": 500.0}, "model.rope_theta = 500.0 does nothing, because"),
        ({"model.num_kv_heads": 3}, "model.num_heads (4) must be divisible by model.num_kv_heads"),
    ],
)
def test_what_means_nothing_is_refused(changes, said):
    with pytest.raises(UserError) as error:
        tiny.build(changes=T5 | changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_stages_do_not_share_weights():
    changes = T5 | {"mesh.stage": 2, "model.scan": True, "train.micro_batch_size": 4}
    with pytest.raises(UserError) as error:
        tiny.build(changes=changes | {"model.repeats": 2}, devices=2)
    assert str(error.value) == (
        'mesh.stage (2) must be 1 with model.attention = "relative_bias": the blocks of a stack '
        "share weights (relative_bias), which no stage could have alone"
    )
