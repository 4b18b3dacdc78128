"""The article's model worked by hand, and what is refused of the options of each kind of model."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
import tiny
from kind_cases import CASES, MULTI, ONE, B, Run, S, close, config, inputs

from configs import base
from moe_jax import train_step
from moe_jax.config import causality
from moe_jax.models import MODELS, article
from moe_jax.moe.layer import Batch
from moe_jax.moe.routing import ROUTERS
from moe_jax.runtime.stopping import first_broken
from moe_jax.schema import options

# The article.


def test_the_articles_example(float64):
    """Section 4.3:

    E has the rows apple (0.1, 0.2) and banana (0.3, 0.4), W the rows (0.5, 0), (0, 0.6), (0, 0),
    (0, 0); g is the sum.

        z_1 = 0.5 (0.1, 0.2) = (0.05, 0.10)
        z_2 = 0.6 (0.3, 0.4) = (0.18, 0.24)
        z_3 = z_4 = (0, 0)
        h = z_1 + z_2 = (0.23, 0.34)
        softmax(h) = (1 / (1 + e^0.11), 1 / (1 + e^-0.11)) = (0.472528, 0.527472)

    The article prints h = 0.55 and 0.6: 0.55 is one number where h is a vector of two, its terms
    add up to 0.62 and not to 0.55 (0.05 + 0.18 + 0.15 + 0.24), and the 0.45 of the second class
    comes from nowhere.
    """
    cfg = config(
        "article", {"num_experts": 4, "window": 2, "activation": "identity", "num_classes": 2}, {}
    )
    cfg = dataclasses.replace(cfg, d_model=2, vocab_size=2)
    run = Run(cfg)
    run.params["ends"] = {"embed": jnp.array([[0.1, 0.2], [0.3, 0.4]]), "head": jnp.eye(2)}
    run.params["experts"] = {"w": jnp.array([[0.5, 0], [0, 0.6], [0, 0], [0, 0]])}
    row = Batch(*(np.asarray(z, np.int32) for z in ([[0, 1]], [[0, 1]], [[1, 1]], [0])))
    h = run(row)[0][0]
    close(h, [0.23, 0.34], atol=1e-15)
    close(jax.nn.softmax(h), [0.472528, 0.527472], atol=1e-6)
    run.params["ends"]["embed"] = jnp.array(
        [[0.1, 0.3], [0.2, 0.4]]
    )  # e_v = E[:, v], as section 4.2 has it
    close(run(row)[0][0], [0.17, 0.39], atol=1e-15)
    assert 0.5 * 0.1 + 0.6 * 0.3 + 0.5 * 0.3 + 0.6 * 0.4 == pytest.approx(0.62)


@pytest.mark.parametrize("aggregate", ["sum", "mean", "gated"])
def test_the_articles_windows_are_the_last_tokens_of_the_segment(float64, aggregate):
    """Against a loop over tokens, experts and places, on packed rows with padding."""
    cfg = config(
        "article", {"num_experts": 8, "window": 4, "aggregate": aggregate, "activation": "relu"}
    )
    run, batch = Run(cfg), inputs("article")
    segment = np.tile(np.array([[1, 1, 2, 2, 2, 2]]), (B, 1)) * batch.segment_BS
    logits = run(batch._replace(segment_BS=segment.astype(np.int32)))[0]
    embed, head, w = (
        np.asarray(z) for z in (*run.params["ends"].values(), run.params["experts"]["w"])
    )
    for b, i in np.argwhere(segment > 0):
        seen = [j for j in range(max(i - 3, 0), i + 1) if segment[b, j] == segment[b, i]]
        e = embed[batch.id_BS[b, seen]]
        z = np.maximum([w[n, 3 - i + np.array(seen)] @ e for n in range(8)], 0)
        weight = {"sum": np.ones(8), "mean": np.full(8, 1 / 8)}.get(aggregate)
        if weight is None:
            weight = np.asarray(
                jax.nn.softmax(e.mean(0) @ np.asarray(run.params["router"]["gate"]))
            )
        close(logits[b, i], weight @ z @ head, atol=1e-12)


# Rules.


def messages(cfg):
    """What is refused of the options of the kind of model."""
    kind = cfg.model.kind
    yield from options.refusals(cfg.model.kind_options, f"model.kinds.{kind}.")
    yield from MODELS[kind].refusals(cfg)


@pytest.mark.parametrize("name", CASES)
def test_what_went_wrong_first_has_a_place_in_every_model(float64, name):
    """The head is nearest to the loss; of an encoder-decoder everything of the decoder is nearer
    than the encoder.
    """
    with jax.set_mesh(meshes.make(*ONE)):
        params = jax.eval_shape(train_step.make_model(CASES[name]()).init, jax.random.key(0))[0]
    names = train_step.parameter_names(params)
    assert "head" in first_broken(names, np.zeros(len(names)))
    assert all(
        first_broken(names, np.arange(len(names)) != i) == names[i] for i in range(len(names))
    )
    encoder = [n for n in names if n.startswith("encoder/")]
    assert not encoder or not first_broken(
        [*encoder, "ends/embed"], np.zeros(len(encoder) + 1)
    ).startswith("encoder")


def test_every_kind_has_options_and_a_model():
    assert set(MODELS) == set(base.get_config().model.kinds)
    assert {kind for _, kind in [(n, c().kind) for n, c in CASES.items()]} == set(MODELS)
    assert article.AGGREGATES == ("sum", "mean", "gated")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "encoder",
            {"pool": "median"},
            'pool = "median" is not known: choose one of sum, mean, max, first',
        ),
        (
            "encoder",
            {"attention": "none"},
            'attention = "none" is not known: choose one of full, causal',
        ),
        (
            "encoder",
            {"learned_positions": 7},
            r"learned_positions \(7\) must be at least data.seq_len \(8\), or 0",
        ),
        ("encdec", {"encoder_repeats": 0}, "needs a block in both"),
        (
            "encdec",
            {"encoder_prefix": ("sparse",)},
            'encoder_prefix = "sparse" is not known: choose one of dense, moe',
        ),
        ("mmoe", {"items": ()}, r"items = \(\) must give every task its number of items"),
        (
            "mmoe",
            {"items": (3, 4)},
            r"num_gates \(3\) must be the number of tasks: .*items \(3, 4\) are 2",
        ),
        (
            "article",
            {"num_classes": 2, "window": 7},
            r"window \(7\) must be at least data.seq_len \(8\)",
        ),
        (
            "article",
            {"aggregate": "max"},
            'aggregate = "max" is not known: choose one of sum, mean, gated',
        ),
    ],
)
def test_bad_options_are_refused_by_name(kind, changes, message):
    whole = dataclasses.replace(
        tiny.build(), model=config(kind, changes, None, MULTI if kind == "mmoe" else None)
    )
    found = next(messages(whole))
    assert re.search(message, found) and found.startswith(("model.", "an encoder-decoder"))


@pytest.mark.parametrize("name", CASES)
def test_good_options_are_not_refused(name):
    whole = tiny.build()
    whole = dataclasses.replace(
        whole, model=CASES[name](), data=dataclasses.replace(whole.data, seq_len=S)
    )
    assert not list(messages(whole))


def test_experts_of_the_article_are_split_over_the_expert_axis():
    cfg = dataclasses.replace(tiny.build((1, 2, 1)), model=config("article", {"num_experts": 5}))
    assert "num_experts (5) must be divisible by mesh.expert (2)" in next(messages(cfg))


def test_only_what_predicts_is_causal():
    choice = ROUTERS["expert_choice"].options(factor=2.0)
    moe = {"router": "expert_choice", "router_options": choice}
    assert causality.leaks(config("decoder", None, None, moe)).future
    assert causality.leaks(config("encdec", None, None, moe)).future
    for kind in ("encoder", "mmoe"):
        cfg = config(kind, None, None, moe)
        assert not any(causality.leaks(cfg)) and causality.reasons(cfg) == []
        shared = config(kind, None, None, {**moe, "group_rows": 2})
        assert causality.leaks(shared).batch and causality.reasons(shared)
