"""Data sets of TFDS on this disk as texts, pairs, images and ratings, without TensorFlow."""

import numpy as np
import PIL.Image
import pytest
import tiny
from task_files import all_train
from tfds_cases import stored

from moe_jax.errors import UserError
from moe_jax.tasks import TASKS
from moe_jax.tasks.classification import data as classification
from moe_jax.tasks.recommendation import data as recommendation
from moe_jax.tasks.translation import data as translation
from moe_jax.tasks.vision import data as vision


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import tensorflow_datasets as tfds

    f, path = tfds.features, tmp_path_factory.mktemp("tfds")
    label = f.ClassLabel(names=["neg", "pos"])

    def texts(n, hidden=False):
        return [{"sentence": f"text {n} {i}", "label": -1 if hidden else i % 2} for i in range(n)]

    secret = {"train": texts(8), "validation": texts(4), "test": texts(3, hidden=True)}
    stored(path, "TinyGlue", {"sentence": f.Text(), "label": label}, secret)
    stored(path, "TinyAlone", {"sentence": f.Text(), "label": label}, {"train": texts(8)})

    def pairs(n):
        return [{"de": f"{n} Wort {i}", "en": f"{n} word {i}"} for i in range(n)]

    stored(
        path,
        "TinyWmt",
        f.Translation(languages=["de", "en"]),
        {"train": pairs(12), "test": pairs(5)},
    )

    def image(i):
        return PIL.Image.fromarray(np.full((4, 4, 3), i, np.uint8))  # an array needs TensorFlow

    def images(n):
        return [{"image": image(i), "label": i % 2} for i in range(n)]

    stored(
        path,
        "TinyImages",
        {"image": f.Image(shape=(4, 4, 3)), "label": label},
        {"train": images(9), "test": images(4)},
    )
    rows = [
        {"user_id": f"u{u}", "movie_id": f"m{m}", "user_rating": 5.0 - 2 * (m == 9)}
        for u in range(30)
        for m in range(u % 3, 10)
    ]
    ratings = {"user_id": f.Text(), "movie_id": f.Text(), "user_rating": np.float32}
    stored(path, "TinyRatings", ratings, {"train": rows})
    return path


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))


def texts(name):
    return classification.open_classification(
        name, "", seq_len=16, tokens="bytes", heldout_every=5, seed=0
    )


def test_texts_are_held_out_where_labels_are_known():
    data = texts("tfds:tiny_glue")
    assert data.rows == {"train": 8, "heldout": 4} and data.about.labels == ("neg", "pos")
    assert (
        data.about.raw["train"][0][3] == "text 8 3"
        and data.about.raw["train"][1].tolist() == [0, 1] * 4
    )
    assert texts("tfds:tiny_glue:train[:50%]#sentence").rows["train"] == 4
    with pytest.raises(
        UserError,
        match=r"tiny_alone has neither a split test nor validation with labels \(it has: train\)",
    ):
        texts("tfds:tiny_alone")
    with pytest.raises(
        UserError,
        match=r"'imdb_reviews' is not in .*nothing is downloaded here: prepare it where there is a "
        r"network",
    ):
        texts("tfds:imdb_reviews")


def test_pairs_go_from_the_language_that_is_named_first():
    options = {"seq_len": 16, "vocab_size": 280, "prefix": False, "heldout_every": 5, "seed": 0}
    data = translation.open_translation("tfds:tiny_wmt#en-de", "", **options)
    assert (
        data.about.raw["heldout"][0][2] == "5 word 2"
        and data.about.raw["heldout"][1][2] == "5 Wort 2"
    )
    assert (data.about.source, data.about.target, data.rows["train"]) == ("en", "de", 12)
    part = translation.open_translation("tfds:tiny_wmt:train[:50%]#en-de", "", **options)
    assert part.rows == {"train": 6, "heldout": 5} and part.about.raw["train"][1][5] == "12 Wort 5"
    with pytest.raises(
        UserError, match="tiny_wmt has texts in de, en; #en-fr named: give #SOURCE-TARGET"
    ):
        translation.open_translation("tfds:tiny_wmt#en-fr", "", **options)


def test_images_have_patches_of_all_channels():
    options = {
        "seq_len": 4,
        "patch": 2,
        "heldout_every": 5,
        "copies": 1,
        "shift": 0,
        "flip": False,
        "seed": 0,
    }
    data = vision.open_vision("tfds:tiny_images", "", **options)
    assert data.rows == {"train": 9, "heldout": 4} and data.about.width == 12
    rows = all_train(data).values_BSP
    assert (
        rows.shape == (9, 4, 12) and abs(rows.mean()) < 1e-5 and (np.diff(rows[:, 0, 0]) > 0).all()
    )


def test_ratings_of_four_stars_are_interactions():
    options = {
        "seq_len": 16,
        "min_items": 2,
        "min_users": 5,
        "most_items": 9,
        "heldout_every": 3,
        "seed": 0,
    }
    data = recommendation.open_recommendation("tfds:tiny_ratings", "", **options)
    assert sum(data.rows.values()) == 30 and set(data.about.items) == {f"m{i}" for i in range(9)}, (
        "m9 has three stars"
    )
    assert data.about.items[:3] == ("m2", "m3", "m4") and data.notes == (), (
        "the most popular first, equals by name"
    )
    some = recommendation.open_recommendation(
        "tfds:tiny_ratings", "", **{**options, "most_items": 8}
    )
    assert (
        some.about.items == ("m2", "m3", "m4", "m5", "m6", "m7", "m8", "m1")
        and max(map(len, some.about.train)) <= 8
    )
    assert some.notes == ("of 9 items the least popular, 1, are left out: the model has 8",)
    with pytest.raises(UserError, match="tiny_glue has no feature movie_id, user_id, user_rating"):
        recommendation.open_recommendation("tfds:tiny_glue", "", **options)


def test_a_model_of_more_items_than_there_are_is_told_how_many():
    changes = {
        "task": "recommendation",
        "tasks.recommendation.dataset": "tfds:tiny_ratings",
        "model.kind": "mmoe",
        "model.kinds.mmoe.items": (4, 6),
        "model.moe.router": "multi_gate",
        "tasks.recommendation.min_items": 2,
        "data.heldout_every": 3,
    }
    with pytest.raises(UserError, match=r"the items of all tasks must be 9, as in \(1, 8\)"):
        TASKS["recommendation"].open(tiny.build(changes=changes))
