"""Blocks with attentions of their own: a period of several, what it costs, and what is refused.

tests/interchange compares models with windows in some layers with transformers, and test_attentions
decodes them.
"""

import jax
import meshes
import numpy as np
import pytest
import tiny
from block_options import OPTIONS

from moe_jax import config
from moe_jax.config import advice, causality, config_file
from moe_jax.errors import UserError
from moe_jax.instruments import leak
from moe_jax.models.functions import make_model
from moe_jax.plan import flops
from moe_jax.schema import blocks
from moe_jax.verify import shrink

AT = "model.attentions.sliding_window.window"
EVERY_OTHER = {"model.period": ("sliding_window:moe", "moe"), "model.repeats": 1, AT: 3}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("moe", ("", "moe", False, "moe")),
        ("depth:dense", ("", "depth:dense", True, "dense")),
        ("latent:moe", ("latent", "moe", False, "moe")),
        ("latent:depth:moe", ("latent", "depth:moe", True, "moe")),
    ],
)
def test_the_kind_of_a_block_is_taken_apart(kind, parts):
    found = (blocks.attention_of(kind), blocks.without_attention(kind))
    assert (*found, blocks.is_depth(kind), blocks.inner(kind)) == parts


def test_a_block_has_the_options_of_its_own_attention():
    cfg = tiny.build(changes=EVERY_OTHER).model
    assert cfg.attentions == ("sliding_window", "grouped_query")
    assert cfg.of_block("sliding_window:moe").attention_options.window == 3
    assert cfg.of_block("moe") is cfg and cfg.num_moe_layers == 2
    # It may be an argument of a compiled function.
    assert hash(cfg) == hash(tiny.build(changes=EVERY_OTHER).model)


def test_the_window_of_some_blocks_hides_keys_from_them_alone(float64):
    """The last of 10 tokens is told of all of them by the block without a window; two blocks with
    windows of 3 reach back 4 tokens.
    """
    windows = EVERY_OTHER | {"model.period": ("sliding_window:moe",) * 2}
    assert [sum(moved(changes)) for changes in (EVERY_OTHER, windows)] == [9, 4]


def moved(changes):
    """Of each token before the last of 10: whether the last one's logits depend on it."""
    id_BS = np.random.default_rng(0).integers(0, 64, (10, 10)).astype(np.int32)
    id_BS[:] = id_BS[:1]
    # Row i has another token at place i.
    id_BS[np.arange(9), np.arange(9)] = (id_BS[0, :9] + 1) % 64
    logits = tiny.first_logits(changes, id_BS)[:, -1]
    return np.abs(logits[:9] - logits[9]).max(1) > 1e-9


def test_a_window_may_have_rotary_frequencies_of_its_own(float64):
    """A window as long as the row, with a base of its own and no scaling, is grouped-query
    attention with that base; with a scaling too, it is that with both.
    """
    scaled = {"model.rope_scaling": "linear", "model.rope_scalings.linear.factor": 3.0}
    own = {"model.attention": "sliding_window", "model.attentions.sliding_window.rope_theta": 50.0}
    unscaled = {"model.attentions.sliding_window.rope_scaled": False}
    plain = {"model.rope_theta": 50.0}
    id_BS = np.random.default_rng(0).integers(0, 64, (2, 10)).astype(np.int32)
    near, far = (tiny.first_logits(changes, id_BS) for changes in (plain, plain | scaled))
    assert np.abs(near - far).max() > 1e-6
    windows = own | scaled
    np.testing.assert_allclose(tiny.first_logits(windows | unscaled, id_BS), near, atol=1e-14)
    np.testing.assert_allclose(tiny.first_logits(windows, id_BS), far, atol=1e-14)


def test_scores_of_each_block_are_counted_by_its_own_keys():
    """8 tokens with window 3 see 21 keys, 36 without; 4 heads of width 4, 4 FLOPs a pair."""
    counted = flops.forward_per_token(tiny.build(changes=EVERY_OTHER).model, 8)
    assert counted.attention_scores == 4 * 4 * 4 * (21 + 36) // 8


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_counted(float64, name):
    cfg = tiny.build(changes=OPTIONS[name]).model
    with jax.set_mesh(meshes.make(1, 1, 1)):
        params, _ = jax.eval_shape(make_model(cfg).init, jax.random.key(0))
    assert flops.parameters(cfg).total == sum(x.size for x in jax.tree.leaves(params))


def test_options_of_an_attention_that_a_block_names_are_chosen():
    defaults = config_file.default_values()
    config.refuse_unchosen(tiny.raw(EVERY_OTHER), defaults)
    with pytest.raises(UserError, match=r'does nothing, because model\.attention is "grouped'):
        config.refuse_unchosen(tiny.raw({AT: 3}), defaults)


def test_advice_leaks_and_small_configs_know_each_attention():
    wide = tiny.build(changes=EVERY_OTHER | {AT: 8})
    (said,) = advice.notes(wide)
    assert f"{AT} = 8 hides nothing in rows of data.seq_len = 8 tokens" in said
    assert not any(causality.sees(wide.model))
    raw = tiny.raw(EVERY_OTHER | {AT: 64})
    small, found = shrink.shrink(raw)
    assert (AT, 64, 5) in [rule[:3] for rule in found]
    assert small["model"]["period"] == ["sliding_window:moe", "moe"]
    assert leak.shrink(raw)["model"]["attentions"]["sliding_window"]["window"] == 10


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.period": ("far:moe",)},
            'model.period, the attention of "far:moe" = "far" is not known: choose one of',
        ),
        ({"model.period": ("latent:mo",)}, 'model.period = "mo" is not known'),
        (
            {"model.period": ("sliding_window:depth:moe",), "model.allow_leak": True},
            "counts tokens that stand side by side, and a depth block has only some of them",
        ),
        (
            EVERY_OTHER | {"model.attentions.sliding_window.rope_theta": 0.5},
            "model.attentions.sliding_window.rope_theta (0.5) must be above 1, or 0, which stands "
            "for model.rope_theta (10000.0)",
        ),
        (
            EVERY_OTHER | {"model.attentions.sliding_window.rope_scaled": False},
            "model.attentions.sliding_window.rope_scaled = False does nothing, because "
            'model.rope_scaling is "none": leave the key alone',
        ),
        (
            {"model.period": ("sliding_window:moe", "moe"), AT: 0},
            f"{AT} = 0 must be at least 1",
        ),
        (
            {
                "model.kind": "encdec",
                "task": "translation",
                "model.period": ("sliding_window:moe",),
            },
            'model.attention = "sliding_window" has no mask "full"',
        ),
        (
            {"model.kind": "mmoe", "task": "recommendation", "model.period": ("latent:dense",)},
            'names an attention, "latent:dense", and model.kind = "mmoe" has none: write "dense"',
        ),
    ],
)
def test_what_cannot_be_is_one_line(changes, said):
    with pytest.raises(UserError) as error:
        tiny.build(changes=changes)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_depth_block_beside_windows_is_none_of_their_business():
    changes = {"model.period": ("sliding_window:moe", "depth:moe"), "model.allow_leak": True}
    assert tiny.build(changes=changes | {AT: 3}).model.num_depth_blocks == 2
