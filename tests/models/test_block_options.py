"""Options of a block that families of models have: what they do, on meshes too; what is refused.

Oracles that are not ours are in tests/interchange.
"""

import dataclasses

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
from block_options import OPTIONS
from suites import normal

from moe_jax import config
from moe_jax.checkpoint import flat
from moe_jax.config import config_file
from moe_jax.errors import UserError
from moe_jax.instruments import leak
from moe_jax.models.attentions.heads import angles
from moe_jax.models.ends import embed, embedding
from moe_jax.models.layers import FeedForward, rms_norm
from moe_jax.models.rope_scalings import ROPE_SCALINGS
from moe_jax.moe.experts.network import Chosen
from moe_jax.optim import decay_mask, describe


# Those of gpt-oss are in the normal suite: biases and sinks, which other tests on meshes lack.
@pytest.mark.parametrize("name", normal(["gpt-oss"], OPTIONS))
@pytest.mark.usefixtures("standard_promotion")
def test_a_mesh_changes_nothing(float64, name):
    """Two steps on a mesh of 2 x 2 x 2, and as a scan, in float64: loss and parameters are those of
    a loop on one device.
    """
    ends = []
    for shape, scan in (((1, 1, 1), False), ((2, 2, 2), True)):
        program = tiny.Program(shape, OPTIONS[name] | {"model.scan": scan})
        now, rows = program.run(2)
        with jax.set_mesh(program.mesh):
            params = flat.unstack(flat.flatten(now.params), scan)
        ends.append((jax.device_get(params), [row["loss"] for row in rows]))
    (params, losses), (others, other_losses) = ends
    np.testing.assert_allclose(other_losses, losses, rtol=1e-12)
    for key, value in params.items():
        np.testing.assert_allclose(others[key], value, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("name", OPTIONS)
def test_nothing_leaks(float64, name):
    measured = leak.measure(config.build(leak.shrink(tiny.raw(OPTIONS[name])), 1), draws=1)
    for mode in leak.MODES:
        assert measured[mode].future.delta == 0 and measured[mode].batch.delta == 0


def test_a_norm_over_the_width_is_of_all_heads_of_a_token():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(4, 6))
    flat_x = x.reshape(2, 3, 24)
    want = flat_x / np.sqrt((flat_x**2).mean(-1, keepdims=True) + 0.1) * scale.reshape(24)
    arrays = jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32)
    got = rms_norm(*arrays, 0.1, plus_one=False)
    np.testing.assert_allclose(got, want.reshape(x.shape), rtol=1e-5)
    # A scale is less by one where a norm adds it.
    got = rms_norm(arrays[0], arrays[1] - 1, 0.1, plus_one=True)
    np.testing.assert_allclose(got, want.reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_a_norm_that_adds_one_keeps_small_scales_in_narrow_numbers():
    """1 + 2^-8 is 1 in bfloat16, which would leave 1.0078 as it was; times 1.0039 it rounds up."""
    x, epsilon = jnp.asarray([1.0078125, -1.0078125], jnp.bfloat16), 1 - 1.0078125**2
    scale = jnp.full(2, 2.0**-8, jnp.bfloat16)
    got = rms_norm(x, scale, epsilon, plus_one=True)
    assert got.tolist() == [1.015625, -1.015625]


def test_scales_that_one_is_added_to_begin_at_zero(float64):
    program = tiny.Program((1, 1, 1), OPTIONS["Gemma 2 and 3"])
    with jax.set_mesh(program.mesh):
        params = program.init(jax.random.key(0)).params
    scales = {name: x for name, x in flat.flatten(params).items() if "norm" in name}
    # Two blocks of four norms and two of queries and keys, and the last one.
    assert len(scales) == 2 * 6 + 1 and not any(np.any(x) for x in scales.values())


def test_scales_and_biases_of_heads_do_not_decay(float64):
    program = tiny.Program((1, 1, 1), OPTIONS["OLMo 2"])
    with jax.set_mesh(program.mesh):
        params = jax.eval_shape(program.init, jax.random.key(0)).params
    decays = flat.flatten(decay_mask("matrices", describe(params, False)))
    for name, decay in decays.items():
        last = name.rpartition("/")[2]
        assert decay == (last in ("q", "k", "v", "o", "w_in", "w_out", "embed", "head", "gate"))


def test_shared_experts_are_gated_by_a_sigmoid(float64):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        plain, gated = (
            FeedForward(jax.random.key(0), 4, 6, Chosen("swiglu"), 0.5, "float64", with_gate)
            for with_gate in (False, True)
        )
        x_BSD = meshes.put(np.random.default_rng(0).normal(size=(1, 3, 4)), "batch", None, None)
        y, z = jax.jit(plain)(x_BSD), jax.jit(gated)(x_BSD)
        gate = 1 / (1 + np.exp(-np.asarray(x_BSD) @ np.asarray(gated.weights["gate"])))
    np.testing.assert_allclose(z, y * gate[..., None], rtol=1e-12)


def test_embeddings_begin_with_a_root_mean_square_of_one_whatever_their_scale():
    for scale in (0.0, 1.0, 7.0):
        cfg = tiny.build(changes={"model.embedding_scale": scale}).model
        factor = scale or 16**0.5
        assert embedding(cfg).std * factor == pytest.approx(1)
        cfg = dataclasses.replace(cfg, dtype="float32")
        with jax.set_mesh(meshes.make(1, 1, 1)):
            table = meshes.put(np.ones((64, 16), np.float32), "vocab", "embed")
            id_BS = meshes.put(np.zeros((1, 2), np.int32), "batch", None)
            np.testing.assert_allclose(jax.jit(embed, static_argnums=2)(table, id_BS, cfg), factor)


# Rotary scalings; tests/interchange compares all of them with transformers.


def turns(changes):
    """cos and sin of positions 0 to 63, and the frequency of each pair, from the angle at 1."""
    cfg = tiny.build(changes={"model.head_dim": 16} | changes).model
    cos, sin = angles(jnp.arange(64)[None], dataclasses.replace(cfg, dtype="float64"), 16)
    return np.asarray(cos[0, :, 0, :8]), np.asarray(sin[0, :, 0, :8])


@pytest.mark.parametrize("name", ROPE_SCALINGS)
def test_a_scaling_slows_pairs_down_by_its_factor_at_most(float64, name):
    scaled = {"model.rope_scaling": name}
    if name != "none":
        scaled[f"model.rope_scalings.{name}.factor"] = 2.0
    plain = np.arctan2(*reversed([x[1] for x in turns({})]))
    cos, sin = turns(scaled)
    frequency = np.arctan2(sin[1], cos[1])
    assert (frequency <= plain + 1e-15).all() and (frequency >= plain / 2 - 1e-15).all()
    # Every pair turns evenly.
    place = np.arange(64)[:, None] * frequency[None]
    size = np.hypot(cos[1], sin[1])
    np.testing.assert_allclose(cos, size * np.cos(place), atol=1e-12)
    np.testing.assert_allclose(size, 0.1 * np.log(2) + 1 if name == "yarn" else 1)


def test_linear_scaling_of_two_gives_every_other_angle(float64):
    linear = {"model.rope_scaling": "linear", "model.rope_scalings.linear.factor": 2.0}
    (plain, _), (scaled, _) = turns({}), turns(linear)
    np.testing.assert_allclose(scaled[::2], plain[:32], atol=1e-12)


# Refusals.

AT = "model.rope_scalings"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.qk_norm_over": "width"},
            'model.qk_norm_over = "width" does nothing, because model.qk_norm is False: set '
            "model.qk_norm=True, or leave the key alone",
        ),
        (
            {"model.moe.shared_hidden": 8},
            "model.moe.shared_hidden = 8 does nothing, because model.moe.shared_experts is 0: set "
            "model.moe.shared_experts=1, or leave the key alone",
        ),
        (
            {"model.moe.shared_gate": True},
            "model.moe.shared_gate = True does nothing, because model.moe.shared_experts is 0: "
            "set model.moe.shared_experts=1, or leave the key alone",
        ),
        (
            {"model.rope_scaling": "llama3", f"{AT}.llama3.low_freq_factor": 4.0},
            f"{AT}.llama3.low_freq_factor (4.0) must be below {AT}.llama3.high_freq_factor (4.0)",
        ),
        (
            {"model.rope_scaling": "yarn", f"{AT}.yarn.beta_slow": 40.0},
            f"{AT}.yarn.beta_slow (40.0) must be below {AT}.yarn.beta_fast (32.0)",
        ),
        (
            {"model.rope_scaling": "yarn", "model.rope_theta": 1.0},
            "model.rope_theta (1.0) must be above 1 for model.rope_scaling=yarn, which tells "
            "pairs apart by their wavelengths",
        ),
        (
            {"model.rope_scaling": "linear", f"{AT}.linear.factor": 0.5},
            f"{AT}.linear.factor = 0.5 must be at least 1",
        ),
        (
            {"model.rope_scaling": "ntk"},
            'model.rope_scaling = "ntk" is not known: choose one of none, linear, llama3, yarn',
        ),
        (
            {"model.norm_position": "between"},
            'model.norm_position = "between" is not known: choose one of before, after, both',
        ),
        (
            {"model.kind": "encoder", "task": "classification", "model.logit_cap": 3.0},
            'model.logit_cap = 3.0 does nothing, because model.kind = "encoder" has a head of its '
            "own: leave the key alone",
        ),
        ({"model.logit_cap": -1.0}, "model.logit_cap = -1.0 must be at least 0"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_one_line(changes, message):
    with pytest.raises(UserError) as error:
        tiny.build(changes=changes)
    assert str(error.value) == message


def test_the_width_of_shared_experts_is_split_over_the_mesh():
    changes = {"model.moe.shared_experts": 1, "model.moe.shared_hidden": 9}
    with pytest.raises(UserError) as error:
        tiny.build((1, 1, 2), changes)
    assert str(error.value) == "model.moe.shared_hidden (9) must be divisible by mesh.model (2)"


@pytest.mark.parametrize("key", ["rope_scaling", "output_bias"])
def test_a_kind_without_attention_has_none_of_its_options(key):
    value = {"rope_scaling": "linear", "output_bias": True}[key]
    raw = tiny.raw({"model.kind": "mmoe", f"model.{key}": value})
    with pytest.raises(UserError) as error:
        config.refuse_unchosen(raw, config_file.default_values())
    assert f"model.{key} = " in str(error.value)
    assert 'does nothing, because model.kind = "mmoe" has no attention' in str(error.value)
