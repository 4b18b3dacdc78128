"""Parameters of every kind of model are those that it has; FLOPs of small ones by hand."""

import dataclasses

import jax
import kind_cases
import meshes
import pytest

from moe_jax import train_step
from moe_jax.plan import flops


@pytest.mark.parametrize("norms", ["before", "both"])
@pytest.mark.parametrize("name", kind_cases.CASES)
def test_parameters_are_those_of_the_model(float64, name, norms):
    cfg = dataclasses.replace(kind_cases.CASES[name](), norm_position=norms)
    with jax.set_mesh(meshes.make(1, 1, 1)):
        params, _ = jax.eval_shape(train_step.make_model(cfg).init, jax.random.key(0))
    counts = flops.parameters(cfg)
    assert counts.total == sum(x.size for x in jax.tree.leaves(params))
    experts = sum(
        x.size
        for path, x in zip(train_step.parameter_names(params), jax.tree.leaves(params))
        if "experts" in path
    )
    assert counts.experts == experts and counts.active <= counts.total


# D 16, 4 heads of 4 and 2 key-value heads: projections are 2 x 16 x 4 x (4 + 2) = 768 weights, 1536
# FLOPs a token.
DENSE = {
    "model.period": ("dense",),
    "model.repeats": 1,
}  # hidden 32, SwiGLU: 3 x 16 x 32 weights, 3072 FLOPs a token


def test_an_encoder_by_hand():
    """8 places: scores 4 x 4 heads x 4 x 8 keys; a head of 3 classes once a row:

    2 x 16 x 3 / 8; vectors of 3: 2 x 3 x 16.
    """
    cfg = kind_cases.config(
        "encoder", {"num_classes": 3, "inputs": "vectors", "input_dim": 3}, DENSE
    )
    assert flops.forward_per_token(cfg, 8) == flops.Breakdown(1536, 512, 3072, 0, 0, 0, 96 + 12)


def test_an_encoder_decoder_by_hand():
    """Three attentions: the encoder's over 8 keys, the decoder's over 4.5 on average (288), the
    cross-attention's over 8. V 64.
    """
    changes = DENSE | {"model.vocab_size": 64}
    cfg = kind_cases.config("encdec", {"encoder_repeats": 1, "encoder_period": ("dense",)}, changes)
    assert flops.forward_per_token(cfg, 8) == flops.Breakdown(
        3 * 1536, 512 + 288 + 512, 2 * 3072, 0, 0, 0, 2 * 16 * 64
    )


def test_the_article_by_hand():
    """5 experts over windows of 4 places:

    2 x 5 x 4 x 16 = 640; gates 2 x 16 x 5 and their sum 2 x 5 x 16; V 64.
    """
    cfg = kind_cases.config("article", {"num_experts": 5, "window": 4, "aggregate": "gated"})
    assert flops.forward_per_token(cfg, 8) == flops.Breakdown(0, 0, 0, 0, 640, 320, 2 * 16 * 64)


def test_tasks_of_mmoe_by_hand():
    """A row of 8 features, 2 tasks, dense mixtures: bottom 2 x 256, towers 2 x 2 x 256, the bag's
    additions; 6 items.
    """
    cfg = kind_cases.config("mmoe", {"items": (4, 2)}, {"model.repeats": 1}, kind_cases.MULTI)
    expert = 3 * 16 * cfg.moe.expert_hidden
    found = flops.forward_per_token(cfg, 8)
    assert found.dense == (512 + 1024) // 8 + 32 and found.head == 2 * 16 * 6 // 8
    assert found.experts == 2 * 2 * 2 * expert // 8 and found.router == 2 * 2 * 16 * 8 // 8
