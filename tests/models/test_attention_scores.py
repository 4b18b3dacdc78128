"""What may become of scores: sinks, a cap, a scale; values of another width than keys; and which
numbers of a head turn. Against a softmax over a boolean mask, and transformers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from attention_cases import as_cache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

from moe_jax.errors import UserError
from moe_jax.models import attention_chunks, attention_parts
from moe_jax.models.attention_core import attention, decode_attention, windowed
from moe_jax.models.attentions import heads

SCALE = 0.4
B, S, H, G, A, V = 2, 130, 4, 2, 6, 3


def draw(seed=0):
    """(q, k, v, sinks), segments with padding in the middle, a cotangent."""
    rng = np.random.default_rng(seed)
    segment = np.repeat([[1, 0, 2, 3]], B, 0).repeat([50, 7, 40, 33], 1).astype(np.int32)
    shapes = ((B, S, H, A), (B, S, G, A), (B, S, G, V), (H,), (B, S, H, V))
    *args, do = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
    return args, jnp.asarray(segment), do


def seen_in(segment, window):
    place, mine = np.arange(S), np.asarray(segment)
    near = (place[:, None] >= place) & (place[:, None] - place < window)
    return near & (mine[:, :, None] == mine[:, None]) & (mine > 0)[:, :, None]


def plain(q, k, v, sinks, seen_BTS, cap):
    """A softmax over all scores and the sink at once, of which the sink's weight is left out."""
    k, v = (jnp.repeat(z, H // G, axis=2) for z in (k, v))
    score = jnp.einsum("bqha,bkha->bhqk", q, k) * SCALE
    if cap:
        score = jnp.tanh(score / cap) * cap
    score = jnp.where(seen_BTS[:, None], score, -1e30)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, :, None, None], (*score.shape[:3], 1))
        weight = jax.nn.softmax(jnp.concatenate([sink, score], -1))[..., 1:]
    else:
        weight = jax.nn.softmax(score)
    return jnp.einsum("bhqk,bkha->bqha", jnp.where(seen_BTS[:, None], weight, 0), v)


@pytest.mark.parametrize(("kernel", "scores"), [("blocks", 2**19), ("blocks", 1), ("chunks", 1)])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_values_and_gradients_equal_a_plain_softmax(
    float64, monkeypatch, kernel, scores, cap, with_sinks
):
    monkeypatch.setattr(attention_parts, "SCORES", scores)
    # Of several chunks in a row.
    monkeypatch.setattr(attention_chunks, "CHUNK_ON_CPU", 32)
    how = {"scale": SCALE, "cap": cap, "kernel": kernel}
    args, segment, do = draw()
    seen = jnp.asarray(seen_in(segment, 20))

    def ours(q, k, v, sinks):
        sink_H = sinks if with_sinks else None
        return attention(q, k, v, windowed(segment, 20), sink_H=sink_H, **how)

    def theirs(q, k, v, sinks):
        return plain(q, k, v, sinks if with_sinks else None, seen, cap)

    def both(f):
        o, pull = jax.vjp(f, *args)
        return o, *pull(do)

    got, want = (jax.jit(lambda f=f: both(f))() for f in (ours, theirs))
    for name, a, b in zip(("o", "q", "k", "v", "sinks"), got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12, err_msg=name)
    assert np.abs(got[-1]).max() > 0.01 or not with_sinks


def test_decoding_has_the_same_sinks_and_cap(float64):
    (q, k, v, sinks), segment, _ = draw()
    seen = jnp.asarray(seen_in(segment, 20))
    want = plain(q, k, v, sinks, seen, 1.5)
    got = decode_attention(q, *as_cache(k, v), seen, scale=SCALE, cap=1.5, sink_H=sinks)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_sink_that_takes_all_leaves_nothing(float64):
    (q, k, v, sinks), segment, _ = draw()
    keys = windowed(segment, 20)
    nothing = attention(q, k, v, keys, scale=SCALE, sink_H=sinks + 1e4)
    assert not np.any(nothing)
    # One that takes nothing changes nothing.
    without = attention(q, k, v, keys, scale=SCALE)
    kept = attention(q, k, v, keys, scale=SCALE, sink_H=sinks - 1e4)
    np.testing.assert_array_equal(kept, without)


# Rotary embeddings.


def turned(changes):
    """Random heads [1, 9, 2, 12] and what they are after turning, by a config."""
    cfg = tiny.build(changes={"model.head_dim": 12} | changes).model
    cfg = dataclasses.replace(cfg, dtype="float64")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 9, 2, 12)))
    width = heads.rope_width(cfg)
    cos, sin = heads.angles(jnp.arange(9)[None], cfg, width)
    return np.asarray(x), np.asarray(heads.turned(x, cos, sin, cfg)), (cos, sin)


def test_neighbours_turn_as_in_transformers(float64):
    x, got, (cos, sin) = turned({"model.rope_pairs": "neighbours"})
    x_BHSA = torch.tensor(x).transpose(1, 2)
    angles = (torch.tensor(np.asarray(z))[:, :, 0] for z in (cos, sin))
    want, _ = apply_rotary_pos_emb_interleave(x_BHSA, x_BHSA, *angles)
    np.testing.assert_allclose(got, want.transpose(1, 2), atol=1e-12)


def test_neighbours_are_halves_of_another_order(float64):
    """Products of queries and keys are those of halves whose columns stand in the other order."""
    x, got, (cos, sin) = turned({"model.rope_pairs": "neighbours"})
    halves = tiny.build(changes={"model.head_dim": 12}).model
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    want = heads.turned(jnp.asarray(x[..., order]), cos, sin, halves)
    np.testing.assert_array_equal(got, want)


def test_a_part_of_a_head_stays(float64):
    x, got, _ = turned({"model.rope_fraction": 0.5})
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])
    # The frequencies are those of a head of that width.
    cfg = tiny.build(changes={"model.head_dim": 6}).model
    cos, sin = heads.angles(jnp.arange(9)[None], dataclasses.replace(cfg, dtype="float64"), 6)
    np.testing.assert_array_equal(
        got[..., :6], heads.turned(jnp.asarray(x[..., :6]), cos, sin, cfg)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.rope_fraction": 0.75},
            "model.rope_fraction (0.75) of model.head_dim (4) is 3: it must be even and not 0, "
            "because rotary embeddings turn pairs",
        ),
        ({"model.rope_fraction": 0.0}, "model.rope_fraction = 0.0 must be above 0 and at most 1"),
        ({"model.rope_pairs": "thirds"}, "choose one of halves, neighbours"),
        ({"model.attention_cap": -1.0}, "model.attention_cap = -1.0 must be at least 0"),
        (
            {"model.kind": "mmoe", "task": "recommendation", "model.attention_sinks": True},
            "does nothing",
        ),
    ],
)
def test_what_cannot_be_is_one_line(changes, said):
    from moe_jax import config
    from moe_jax.config import config_file

    with pytest.raises(UserError) as error:
        config.refuse_unchosen(tiny.raw(changes), config_file.default_values())
        tiny.build(changes=changes)
    assert said in str(error.value) and "\n" not in str(error.value)
