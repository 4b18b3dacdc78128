"""Labels that are none: left out and counted where the set says so, refused where they are damage;
no index is guessed.
"""

import csv
import gzip
import io

import numpy as np
import PIL.Image
import pytest
from task_files import all_train, packed
from tfds_cases import stored

from moe_jax.errors import UserError
from moe_jax.tasks.classification import data as classification
from moe_jax.tasks.recommendation import data as recommendation
from moe_jax.tasks.translation import data as translation
from moe_jax.tasks.vision import data as vision

IMAGES = {
    "seq_len": 4,
    "patch": 2,
    "heldout_every": 5,
    "copies": 1,
    "shift": 0,
    "flip": False,
    "seed": 0,
}
PAIRS = {"seq_len": 16, "vocab_size": 280, "prefix": False, "heldout_every": 5, "seed": 0}
RATINGS = {
    "seq_len": 16,
    "min_items": 2,
    "min_users": 2,
    "most_items": 9,
    "heldout_every": 3,
    "seed": 0,
}


def texts(name, folder=""):
    return classification.open_classification(
        name, str(folder), seq_len=16, tokens="bytes", heldout_every=5, seed=0
    )


@pytest.fixture
def tfds(tmp_path, monkeypatch):
    from moe_jax.data.tfds_import import tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tfds.features


def store_texts(folder, features, labels):
    """A set TinyLabels whose training texts have these labels, and of whose held-out ones the first
    has none.
    """
    kind = {"text": features.Text(), "label": features.ClassLabel(names=["neg", "pos"])}

    def rows(numbers):
        return [{"text": f"text {i}", "label": label} for i, label in enumerate(numbers)]

    stored(folder, "TinyLabels", kind, {"train": rows(labels), "test": rows([-1, 0, 1])})


def test_texts_without_a_label_are_left_out_and_counted(tmp_path, tfds):
    store_texts(tmp_path, tfds, [0, -1, 1, -1, 0])
    data = texts("tfds:tiny_labels")
    assert data.about.raw["train"][0] == ["text 0", "text 2", "text 4"] and data.about.raw["train"][
        1
    ].tolist() == [
        0,
        1,
        0,
    ]
    assert (
        data.rows == {"train": 3, "heldout": 2}
        and data.notes[0] == "3 of 8 texts have no label and are left out"
    )


def test_a_set_without_any_label_is_refused(tmp_path, tfds):
    store_texts(tmp_path, tfds, [-1, -1])
    with pytest.raises(UserError, match="tfds:tiny_labels has no train text with a label"):
        texts("tfds:tiny_labels")


@pytest.mark.parametrize("label", [2, -2])
def test_a_label_that_is_no_class_is_refused(tmp_path, tfds, monkeypatch, label):
    store_texts(tmp_path, tfds, [0, 1])
    from moe_jax.data.sources import tfds_datasets

    rows = [{"text": b"a", "label": 0}, {"text": b"b", "label": label}]
    monkeypatch.setattr(tfds_datasets, "open_split", lambda *_: rows)
    with pytest.raises(
        UserError,
        match=rf"tiny_labels, split train, record 1 has label {label}, but the 2 classes are 0 to "
        r"1",
    ):
        texts("tfds:tiny_labels")


def test_images_without_a_label_are_left_out_and_counted(tmp_path, tfds):
    kind = {"image": tfds.Image(shape=(4, 4, 1)), "label": tfds.ClassLabel(num_classes=3)}

    def image(i):
        return PIL.Image.fromarray(np.full((4, 4), i, np.uint8))

    def rows(labels):
        return [{"image": image(i), "label": label} for i, label in enumerate(labels)]

    stored(tmp_path, "TinyPictures", kind, {"train": rows([0, -1, 2, 1]), "test": rows([-1, 1])})
    data = vision.open_vision("tfds:tiny_pictures", "", **IMAGES)
    assert data.rows == {"train": 3, "heldout": 1} and data.notes == (
        "2 of 6 images have no label and are left out",
    )
    assert all_train(data).label_B.tolist() == [0, 2, 1] and data.about.raw["train"][0][
        :, 0
    ].tolist() == [0, 2, 3]


def idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 10, 2], r"fashion_mnist, example 2 has label 10, but the 10 classes are 0 to 9"),
        ([0, 1, 255, 2], r"example 2 has label 255"),
        (
            [0, 1, 2],
            r"train-images-idx3-ubyte.gz has shape \(4, 28, 28\) and train-labels-idx1-ubyte.gz "
            r"\(3,\)",
        ),
    ],
)
def test_labels_of_idx_files_are_checked(tmp_path, labels, message):
    for part in ("train", "t10k"):
        idx(tmp_path / "fashion_mnist" / f"{part}-images-idx3-ubyte.gz", np.zeros((4, 28, 28)))
        idx(
            tmp_path / "fashion_mnist" / f"{part}-labels-idx1-ubyte.gz",
            np.array(labels if part == "train" else [0] * 4),
        )
    with pytest.raises(UserError, match=message):
        vision.open_vision("fashion_mnist", str(tmp_path), **{**IMAGES, "seq_len": 49, "patch": 4})


def banking(folder, rows):
    for name in ("train", "test"):
        text = io.StringIO()
        csv.writer(text).writerows(
            rows if name == "train" else [("text", "category"), ("tested", "card")]
        )
        packed(folder / f"banking77_{name}.csv.gz", text.getvalue().splitlines())


def test_a_row_of_a_table_without_a_label_is_left_out_and_counted(tmp_path):
    banking(tmp_path, [("text", "category"), ("my PIN", "pin"), ("my card", ""), ("cut",)])
    data = texts("banking77", tmp_path)
    assert data.about.raw["train"][0] == ["my PIN"] and data.notes == (
        "2 of 4 texts have no label and are left out",
    )
    banking(tmp_path, [("text", "intent"), ("my PIN", "pin")])
    with pytest.raises(
        UserError, match="must have the columns text, category; its first line has text, intent"
    ):
        texts("banking77", tmp_path)


def test_a_rating_that_is_no_number_is_refused_and_an_empty_one_is_left_out(tmp_path):
    lines = [f"movie\t{1 - 2 * (i % 2)}\tfilm number {i}" for i in range(40)]
    path = tmp_path / "vader_sentiment_4domains.tsv.gz"
    packed(path, ["domain\tvalence\ttext", *lines, "\t2.5\tno domain", "movie\t\tno rating"])
    data = texts("vader", tmp_path)
    assert (
        sum(data.rows.values()) == 41
        and data.notes[0] == "1 of 42 texts have no label and are left out"
    )
    for cell in ("good", "nan"):
        packed(path, ["domain\tvalence\ttext", *lines, f"movie\t{cell}\tfilm"])
        with pytest.raises(UserError, match=f"the valence '{cell}' is no number"):
            texts("vader", tmp_path)


def test_a_record_that_is_no_utf8_is_one_message_in_every_task(tmp_path, tfds):
    label, text = tfds.ClassLabel(names=["a", "b"]), tfds.Text()
    rows = [{"text": b"right", "label": 0}, {"text": b"wr\xffng", "label": 1}]
    stored(tmp_path, "TinyBytes", {"text": text, "label": label}, {"train": rows, "test": rows})
    pairs = [{"en": b"right", "fr": b"juste"}, {"en": b"wr\xffng", "fr": b"faux"}]
    stored(
        tmp_path,
        "TinyPairs",
        tfds.Translation(languages=["en", "fr"]),
        {"train": pairs, "test": pairs},
    )
    kind = {"user_id": text, "movie_id": text, "user_rating": np.float32}
    stars = [
        {"user_id": b"u", "movie_id": movie, "user_rating": 5.0} for movie in (b"m", b"wr\xffng")
    ]
    stored(tmp_path, "TinyStars", kind, {"train": stars})
    openings = {
        "tiny_bytes": lambda: texts("tfds:tiny_bytes"),
        "tiny_pairs": lambda: translation.open_translation("tfds:tiny_pairs#en-fr", "", **PAIRS),
        "tiny_stars": lambda: recommendation.open_recommendation("tfds:tiny_stars", "", **RATINGS),
    }
    for name, opening in openings.items():
        with pytest.raises(
            UserError,
            match=rf"dataset {name}, split train, record 1 is not UTF-8 \(byte 0xff after 'wr'\)",
        ):
            opening()
