"""Every task from its data to its predictions, on tiny sets written here; and its step equal on a
mesh and on one device.
"""

import gzip
import itertools
import json
import math
import time

import jax
import meshes
import numpy as np
import pytest
import tiny
from scipy.io import wavfile
from suites import normal

from moe_jax import train, train_step
from moe_jax.data.batches import eval_batches
from moe_jax.errors import UserError
from moe_jax.parallel import batch_rows
from moe_jax.report.metrics import read_rows
from moe_jax.run import load_run
from moe_jax.tasks import TASKS
from moe_jax.tasks.contract import Losses

SMALL = {
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.repeats": 1,
    "train.steps": 6,
    "train.batch_size": 8,
    "eval.every": 0,
    "eval.batch_size": 8,
    "eval.sample_tokens": 0,
    "optim.warmup_steps": 1,
    "data.heldout_every": 3,
}
TEXT = {"model.vocab_size": 264, "data.seq_len": 16}
LANGUAGE = {
    **SMALL,
    **TEXT,
    "model.param_dtype": "float32",
    "model.dtype": "float32",
    "data.sources": (("embedded:verse", 1.0),),
    "data.slice_bytes": 20_000,
    "data.heldout_every": 20,
}
PAIRS = {"model.vocab_size": 512, "data.seq_len": 24}
# Of each task: what its tiny config changes, and the columns of its table.
CASES = {
    "classification": (
        {"model.kind": "encoder", "tasks.classification.tokens": "bytes", **TEXT},
        ("accuracy", "macro F1"),
    ),
    "translation": (
        {
            "model.kind": "encdec",
            "model.kinds.encdec.encoder_repeats": 1,
            "tasks.translation.vocab_size": 300,
            **PAIRS,
        },
        ("BLEU", "chrF", "signature"),
    ),
    "translation_prefix": (
        {
            "model.kinds.decoder.bidirectional_prefix": True,
            "tasks.translation_prefix.vocab_size": 300,
            **PAIRS,
            "data.seq_len": 48,
        },
        ("BLEU", "chrF", "signature"),
    ),
    "vision": (
        {
            "model.kind": "encoder",
            "model.kinds.encoder.inputs": "vectors",
            "model.kinds.encoder.input_dim": 16,
            "model.kinds.encoder.num_classes": 10,
            "tasks.vision.patch": 4,
            "data.seq_len": 4,
        },
        ("accuracy", "macro F1"),
    ),
    "recommendation": (
        {
            "model.kind": "mmoe",
            "model.kinds.mmoe.items": (10, 20),
            "model.kinds.mmoe.item_dropout": 0.3,
            "model.moe.router": "multi_gate",
            "model.vocab_size": 32,
            "tasks.recommendation.min_users": 2,
            "data.seq_len": 8,
        },
        ("recall@20", "ndcg@20"),
    ),
    "speech": (
        {
            "model.kind": "encoder",
            "model.kinds.encoder.inputs": "vectors",
            "model.kinds.encoder.input_dim": 60,
            "model.kinds.encoder.num_classes": 3,
            "tasks.speech.mel_bins": 20,
            "tasks.speech.stack": 3,
            "data.seq_len": 8,
        },
        ("accuracy", "macro F1"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny files in the format of the real ones."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["good", "bad", "film", "book", "very", "not", "a", "the", "long", "end"]

    def sentence():
        return " ".join(rng.choice(words, 3)) + f" {rng.integers(1000)}"

    write(
        folder / "vader_sentiment_4domains.tsv.gz",
        ["domain\tvalence\ttext"]
        + [
            f"{rng.choice(['movie', 'nyt'])}\t{rng.choice([-2, 2])}\t{sentence()}"
            for _ in range(90)
        ],
    )
    write(
        folder / "bible_kjv_rv1909_en_es.tsv.gz",
        [
            f"Genesis {i}:1\t{text}\t{text[::-1]}"
            for i, text in enumerate(sentence() for _ in range(60))
        ],
    )
    items = [f"lib{i}" for i in range(10)] + [f"x{i}" for i in range(20)]
    users = [" ".join(rng.choice(items, 7, replace=False)) for _ in range(80)]
    write(
        folder / "debian12_depends.tsv.gz",
        ["package\tdepends"] + [f"p{i}\t{user}" for i, user in enumerate(users)],
    )
    spoken(folder / "recordings")
    return folder


def write(path, lines):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def spoken(folder):
    """Three digits by two speakers, as tones: 30 recordings to be tested on, 18 to learn from."""
    folder.mkdir()
    for digit, speaker, index in itertools.product(range(3), ("ann", "bob"), range(8)):
        turns = 2 * np.pi * np.arange(800 + 160 * index) * (300 * (digit + 1) + 10 * index) / 8000
        wavfile.write(
            folder / f"{digit}_{speaker}_{index}.wav", 8000, (8000 * np.sin(turns)).astype(np.int16)
        )


def config(task, folder=None):
    changes = (
        SMALL
        | CASES[task][0]
        | {"task": task, "model.param_dtype": "float32", "model.dtype": "float32"}
    )
    return changes | ({"data.folder": str(folder)} if folder else {})


def run(workdir, changes):
    with jax.set_mesh(meshes.make(1, 1, 1)):
        return train.run(tiny.build(changes=changes), tiny.raw(changes), workdir, time.monotonic())


@pytest.mark.parametrize("task", normal(["vision"], CASES))
def test_from_data_to_predictions_with_a_stop_between(tmp_path, folder, task):
    changes = config(task, folder)
    cfg = tiny.build(changes=changes)
    data = TASKS[task].open(cfg)
    run(tmp_path, changes | {"train.stop_at": 3})
    result = run(tmp_path, changes)  # goes on from step 3
    assert result.step == 6 and math.isfinite(result.evaluation["loss"])
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert (
        len(rows) == sum(data.sizes("heldout")) > 8
    )  # more than a batch, and the last one not full
    table = TASKS[task].comparison(cfg, data, result.evaluation)
    assert list(table)[-1] == "model" and len(table) >= 3
    assert all(tuple(row) == CASES[task][1] for row in table.values())
    assert (
        result.evaluation["routing"].sum() > 0 and (tmp_path / "routing.png").stat().st_size > 1000
    )
    assert TASKS[task].headline(result.evaluation).startswith("held out ")


@pytest.mark.parametrize("length", [4, 5, 6])
def test_a_random_row_of_few_tokens_has_a_prefix_and_targets(length):
    cfg = tiny.build((1, 1, 1), config("translation_prefix") | {"data.seq_len": length})
    rows = TASKS["translation_prefix"].random(cfg, 0)
    assert (rows.prefix_BS.sum(1) >= 2).all() and (rows.weight_BS.sum(1) >= 1).all()


@pytest.mark.parametrize("task", normal(["translation"], CASES))
def test_a_step_is_the_same_on_a_mesh(float64, task):
    """One optimizer step of random rows, accumulated on the mesh: loss and parameters of one
    device.
    """
    found = []
    for shape, more in (((1, 1, 1), {}), ((2, 2, 2), {"train.micro_batch_size": 4})):
        changes = (
            config(task)
            | {"model.param_dtype": "float64", "model.dtype": "float64", "eval.batch_size": 8}
            | more
        )
        cfg = tiny.build(shape, changes)
        with jax.set_mesh(meshes.make(*shape)):
            model = train_step.make_model(cfg.model)
            begin = jax.jit(train_step.initial(cfg, model))(jax.random.key(0))
            step = jax.jit(train_step.make_step(cfg, model, train_step.make_tx(cfg, begin.params)))
            batch = batch_rows.put(TASKS[task].random(cfg, 0), np.arange(8), 8)
            end, metrics = step(begin, batch)
            found.append(
                (float(metrics["loss"]), jax.tree.map(np.asarray, jax.device_get(end.params)))
            )
    (loss, params), (mesh_loss, mesh_params) = found
    assert mesh_loss == pytest.approx(loss, abs=1e-11)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), params, mesh_params)


def test_figures_of_labels_by_hand():
    """Three rows and a filler: accuracy 2 / 3; class 0 has F1 2 * 1 / (1 + 2), class 1 has 2 * 1 /
    (2 + 1).
    """
    from types import SimpleNamespace

    from moe_jax.data.examples import LabelledTokens
    from moe_jax.tasks import labelled as labels

    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 9.0]])
    zero = np.zeros((4, 1), np.int32)
    told = (np.array([0, 0, 1, 0]), np.array([0, 1, 1, 0]), np.array([1.0, 1, 1, 0]), np.arange(4))
    batch = LabelledTokens(zero, zero, zero, *told)
    data = SimpleNamespace(domains=("a", "b"))
    found = Losses(np.ones(4), batch.weight_B, logits, {})
    total = jax.tree.map(
        np.asarray,
        labels.evaluate(
            jax.tree.map(jax.numpy.asarray, found), jax.tree.map(jax.numpy.asarray, batch), data
        ),
    )
    figures = labels.summary(total, data)
    assert figures["accuracy"] == pytest.approx(2 / 3) and figures["loss"] == pytest.approx(1.0)
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert figures["domain/a/accuracy"] == 1.0 and figures["domain/b/accuracy"] == 0.0


def test_ranking_equals_the_one_of_the_baselines():
    """Recall and NDCG in the traced evaluation are those that the baselines are judged by."""
    from types import SimpleNamespace

    from moe_jax.data.examples import Baskets
    from moe_jax.tasks.recommendation import task as recommendation
    from moe_jax.tasks.recommendation.rivals import ranking

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 60))
    picks = np.stack([rng.permutation(60)[:10] for _ in range(6)])
    weight = np.ones((6, 5), np.float32)
    weight[2, 3:] = 0
    batch = Baskets(
        picks[:, :5], np.ones((6, 5)), picks[:, 5:], weight, np.zeros(6, np.int32), np.arange(6)
    )
    batch, found = jax.tree.map(
        jax.numpy.asarray, (batch, Losses(np.ones((6, 5)), weight, logits, {}))
    )
    data = SimpleNamespace(domains=("all",))
    figures = recommendation.summary(
        jax.tree.map(np.asarray, recommendation.evaluate(found, batch, data)), data
    )
    scores = logits.copy()
    np.put_along_axis(scores, picks[:, :5], -np.inf, 1)
    wanted = [row[5:][w > 0] for row, w in zip(picks, weight, strict=True)]
    recall, ndcg = ranking(scores, wanted).mean(1)
    assert figures["recall@20"] == pytest.approx(recall) and figures["ndcg@20"] == pytest.approx(
        ndcg, rel=1e-6
    )


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            "vision",
            {"model.kind": "decoder"},
            'model.kind = "decoder" cannot learn task = "vision": choose one of encoder',
        ),
        (
            "vision",
            {"model.kinds.encoder.num_classes": 9},
            "model.kinds.encoder.num_classes = 9, but digits needs 10",
        ),
        ("vision", {"data.seq_len": 5}, "set data.seq_len=4"),
        ("vision", {"tasks.vision.dataset": "nothing"}, "nothing"),
        ("classification", {"data.folder": "/nowhere"}, "python -m moe_jax data vader"),
        (
            "classification",
            {"model.vocab_size": 128},
            "model.vocab_size (128) is smaller than the vocabulary of vader",
        ),
        ("recommendation", {"model.kinds.mmoe.items": (10, 19)}, "must be 30, as in (10, 20)"),
        ("classification", {"record.steps": "3"}, "record.steps = 3 looks into the language model"),
    ],
)
def test_mistakes_are_one_message(folder, task, changes, message):
    with pytest.raises(UserError) as error:
        TASKS[task].open(tiny.build(changes=config(task, folder) | changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_articles_model_learns_the_next_byte_with_fixed_zeros(tmp_path):
    """Three in four of the experts' weights are zero by the rule `static`, and still are after six
    steps, in which the others learned.
    """
    article = {
        "model.kind": "article",
        "model.kinds.article.num_experts": 4,
        "model.kinds.article.window": 4,
        "model.moe.sparse.rule": "static",
        "model.repeats": 0,
        "optim.learning_rate": 0.01,
    }
    result = run(tmp_path, LANGUAGE | article)
    assert result.step == 6 and result.evaluation["loss"] < math.log(264)
    zeros = {
        name: (value == 0).mean() for name, value in saved(tmp_path).items() if "experts" in name
    }
    assert zeros and all(0.7 < fraction < 0.8 for fraction in zeros.values()), zeros


ROUTER = {"model.moe.router": "sigmoid", "model.moe.routers.sigmoid.bias_rate": 0.125}


def test_a_language_model_exports_how_its_last_evaluation_went(language):
    """Of every held-out row, once; they add up to the held-out loss."""
    rows = [
        json.loads(line)
        for line in (language / "lm" / "predictions.jsonl").read_text().splitlines()
    ]
    cfg = tiny.build(changes=LANGUAGE | ROUTER)
    data = TASKS["lm"].open(cfg)
    assert sorted(row["index"] for row in rows) == list(range(sum(data.sizes("heldout"))))
    assert {row["domain"] for row in rows} == set(data.domains)
    assert sum(row["tokens"] for row in rows) == sum(
        batch.segment_BS.astype(bool).sum() for batch in eval_batches(data, 8)
    )
    said = next(r for r in read_rows(language / "lm" / "metrics.jsonl") if "eval/loss" in r)
    assert sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows) == pytest.approx(
        said["eval/loss"]
    )
    weighted = sum(row["nats"] / row["bits_per_byte"] for row in rows) * said["eval/bits_per_byte"]
    assert weighted == pytest.approx(
        sum(row["nats"] for row in rows), rel=0.02
    )  # rounding of a row without text


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A language model of two steps, and a set of labelled texts beside it."""
    folder = tmp_path_factory.mktemp("language")
    run(folder / "lm", LANGUAGE | ROUTER | {"train.steps": 2})
    (folder / "data").mkdir()
    lines = [f"movie\t{(-1) ** i * 2}\t{'bad' if i % 2 else 'good'} {i}" for i in range(60)]
    write(folder / "data" / "vader_sentiment_4domains.tsv.gz", ["domain\tvalence\ttext", *lines])
    return folder


def tuned(language, workdir, changes):
    """(parameters before, after): what the language model and the classifier that began from it
    share; and the classifier's head.
    """
    begin = {"model.kinds.encoder.attention": "causal", "train.init_from": str(language / "lm")}
    run(workdir, config("classification", language / "data") | begin | ROUTER | changes)
    before, after = saved(language / "lm"), saved(workdir)
    shared = sorted(set(before) & set(after))
    assert len(shared) > 8 and any("experts" in name for name in shared)
    assert np.abs(after["head/b"]).max() > 0
    return {name: (before[name], after[name]) for name in shared}


def test_a_linear_probe_of_a_language_model_moves_its_head_alone(language, tmp_path):
    """A decoder's parameters and its routers' bias become an encoder's, and stay as they were to
    the last bit; the head has moved.
    """
    shared = tuned(language, tmp_path, {"optim.train_only": "^head/", "optim.optimizer": "muon"})
    assert any(before.any() for name, (before, _) in shared.items() if name.endswith("state/bias"))
    for name, (before, after) in shared.items():
        np.testing.assert_array_equal(before, after, err_msg=name)


def test_fine_tuning_a_language_model_moves_its_trunk_from_where_it_was(language, tmp_path):
    """One small step of AdamW: every parameter is about a learning rate from the language model's,
    which no fresh values would be.
    """
    shared = tuned(
        language, tmp_path, {"train.steps": 1, "optim.warmup_steps": 0, "optim.learning_rate": 1e-4}
    )
    for name, (before, after) in shared.items():
        if "state/" not in name:
            assert 0 < np.abs(after - before).max() < 3e-4, name


def saved(workdir):
    """The parameters and router states of the newest checkpoint by name."""
    with jax.set_mesh(meshes.make(1, 1, 1)):
        run = load_run(workdir)
        parts = run.parameters, run.router_state

    def named(tree):
        return zip(
            train_step.parameter_names(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True
        )

    return {name: value for tree in parts for name, value in named(tree)}
