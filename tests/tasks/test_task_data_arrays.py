"""Images, recordings and baskets: rows as the tasks expect them, the same every time, nothing
leaked, clear messages.
"""

import gzip
import io
import tarfile

import numpy as np
import pytest
from task_files import all_train, packed

from moe_jax.data.batches import eval_batches
from moe_jax.errors import UserError
from moe_jax.tasks import rivals
from moe_jax.tasks.recommendation import data as recommendation
from moe_jax.tasks.speech import data as speech
from moe_jax.tasks.vision import data as vision


def open_digits(**options):
    options = {
        "seq_len": 16,
        "patch": 2,
        "heldout_every": 5,
        "copies": 1,
        "shift": 1,
        "flip": False,
        "seed": 0,
        **options,
    }
    return vision.open_vision("digits", "nowhere", **options)


def test_digits_are_standardised_patches_and_have_no_twin_in_training():
    data = open_digits()
    rows = all_train(data)
    assert (
        rows.values_BSP.shape == (data.rows["train"], 16, 4) and rows.values_BSP.dtype == np.float32
    )
    assert abs(rows.values_BSP.mean()) < 1e-3 and abs(rows.values_BSP.std() - 1) < 1e-3
    image = data.about.raw["train"][0][3].reshape(8, 8).astype(float)
    patch = image[2:4, 4:6].reshape(-1)  # the third patch of the second line
    scale = np.ptp(rows.values_BSP[3]) / np.ptp(image)
    np.testing.assert_allclose(
        np.diff(rows.values_BSP[3, 6]), np.diff(patch) * scale, rtol=1e-4, atol=1e-5
    )
    assert (
        sum(data.rows.values()) == 1797 and data.about.width == 4 and (rows.segment_BS == 1).all()
    )
    pixels = [{row.tobytes() for row in data.about.raw[part][0]} for part in ("train", "heldout")]
    assert not pixels[0] & pixels[1]


def test_copies_are_moved_the_same_way_every_time():
    plain, data = open_digits(), open_digits(copies=3)
    rows, number = all_train(data), plain.rows["train"]
    assert (
        data.rows == {"train": 3 * number, "heldout": plain.rows["heldout"]}
        and data.fingerprint != plain.fingerprint
    )
    np.testing.assert_array_equal(rows.values_BSP[:number], all_train(plain).values_BSP)
    np.testing.assert_array_equal(rows.label_B.reshape(3, -1)[0], rows.label_B.reshape(3, -1)[2])
    same = (
        (rows.values_BSP.reshape(3, number, -1)[1] == rows.values_BSP.reshape(3, number, -1)[0])
        .all(1)
        .mean()
    )
    assert 0.05 < same < 0.25, "one move in nine is none"
    np.testing.assert_array_equal(all_train(open_digits(copies=3)).values_BSP, rows.values_BSP)


def test_an_image_moves_down_right_and_in_the_mirror():
    image = np.arange(9, dtype=np.uint8).reshape(1, 3, 3, 1)

    def move(*by):
        return vision.moved(image, np.array([by], np.int8), 1)[0, :, :, 0].tolist()

    assert move(0, 0, 0) == image[0, :, :, 0].tolist()
    assert move(1, 0, 0) == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert move(0, 1, 0) == [[0, 0, 1], [3, 3, 4], [6, 6, 7]]
    assert move(0, 0, 1) == [[2, 1, 0], [5, 4, 3], [8, 7, 6]]


def test_a_wrong_number_of_patches_names_both():
    with pytest.raises(
        UserError,
        match=r"data.seq_len = 20, but an image of digits \(8 x 8\) has 16 patches of 2 x 2: set "
        r"data.seq_len=16",
    ):
        open_digits(seq_len=20)
    with pytest.raises(UserError, match="patches of 3 pixels do not divide images of 8 x 8"):
        open_digits(patch=3)


def test_classical_models_read_digits():
    table = rivals.baseline_figures(open_digits())
    assert (
        table["5 nearest neighbours"]["accuracy"] > 0.97
        and table["logistic regression"]["accuracy"] > 0.95
    )
    assert table["majority"]["accuracy"] < 0.2


def test_fashion_mnist_is_read_from_its_idx_files(tmp_path):
    for part, number in (("train", 30), ("t10k", 10)):
        pixels = np.arange(number * 784).astype(np.uint8).reshape(number, 28, 28)

        def head(*shape):
            return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()

        for kind, array in (
            ("images-idx3", pixels),
            ("labels-idx1", np.arange(number).astype(np.uint8) % 10),
        ):
            path = tmp_path / "fashion_mnist" / f"{part}-{kind}-ubyte.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress(head(*array.shape) + array.tobytes()))
    options = {
        "seq_len": 49,
        "patch": 4,
        "heldout_every": 5,
        "copies": 1,
        "shift": 0,
        "flip": False,
        "seed": 0,
    }
    data = vision.open_vision("fashion_mnist", str(tmp_path), **options)
    assert data.rows == {"train": 30, "heldout": 10} and data.about.labels[9] == "Ankle boot"
    np.testing.assert_array_equal(
        data.about.raw["heldout"][0][2], (np.arange(784) + 2 * 784).astype(np.uint8)
    )
    path.write_bytes(b"no gzip")
    with pytest.raises(
        UserError, match=r"t10k-labels-idx1-ubyte.gz is no idx file packed with gzip"
    ):
        vision.open_vision("fashion_mnist", str(tmp_path), **options)


@pytest.fixture
def depends(tmp_path):
    """Users of two tastes: packages named a* want even libraries, b* odd ones."""
    random = np.random.default_rng(0)
    lines = [
        f"{'ab'[i % 2]}{i}\t"
        + " ".join(f"lib{n:02}" for n in random.permutation(20)[:7] * 2 + i % 2)
        for i in range(200)
    ]
    packed(
        tmp_path / "recommendation" / "debian12_depends.tsv.gz",
        ["package\tdepends", *lines, "few\tlib00 lib01"],
    )
    return tmp_path


def open_baskets(folder, **options):
    options = {
        "seq_len": 8,
        "min_items": 5,
        "min_users": 10,
        "most_items": 9,
        "heldout_every": 5,
        "seed": 0,
        **options,
    }
    return recommendation.open_recommendation("debian_depends", str(folder), **options)


def test_held_out_users_are_strangers_of_whom_a_part_is_shown(depends):
    data = open_baskets(depends)
    market, rows = data.about, all_train(data)
    assert len(market.items) == 40 and sum(data.rows.values()) == 200
    assert not set(market.users["train"]) & set(market.users["heldout"])
    np.testing.assert_array_equal(rows.items_BL, rows.targets_BL)
    assert (rows.weight_BL.sum(1) == 7).all() and not rows.items_BL[rows.weight_BL == 0].any()
    assert all(sorted(row[:7]) == sorted(items) for row, items in zip(rows.items_BL, market.train))
    for seen, wanted in zip(market.shown, market.hidden):
        assert len(seen) == 6 and len(wanted) == 1 and not set(seen) & set(wanted)
    held = next(iter(eval_batches(data, 4)))
    assert held.weight_BL.sum() == 24 and held.target_weight_BL.sum() == 4


def test_neighbours_know_the_tastes_that_popularity_does_not(depends):
    popular, knn = rivals.baseline_figures(open_baskets(depends)).values()
    assert (
        knn["recall@20"] == 1.0
        and popular["recall@20"] < 0.9
        and knn["ndcg@20"] > popular["ndcg@20"]
    )


def test_recall_and_ndcg_by_hand():
    scores = np.array([[5.0, 4.0, 3.0, 2.0] + [0.0] * 30])
    recall, ndcg = rivals.recommendation.ranking(scores, [np.array([1, 3, 33])])[:, 0]
    assert recall == pytest.approx(2 / 3)
    # Hits at ranks 2 and 4 of three that could stand at 1, 2 and 3: (1/log2 3 + 1/log2 5) / (1 +
    # 1/log2 3 + 1/2).
    assert ndcg == pytest.approx((0.63093 + 0.43068) / (1 + 0.63093 + 0.5), abs=1e-4)


def test_similarity_by_hand():
    train = rivals.recommendation.matrix([np.array([0, 1]), np.array([0, 1]), np.array([0, 2])], 3)
    similar = rivals.recommendation.similarity(train, 1, 0.0).toarray()
    # |0| = sqrt 3, |1| = sqrt 2, |2| = 1; 0 and 1 share two users, 0 and 2 one. Each column keeps
    # its largest.
    expected = [[0, 2 / 6**0.5, 1 / 3**0.5], [2 / 6**0.5, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(similar, expected, rtol=1e-6)


def test_lists_that_do_not_fit_are_cut_in_training_and_refused_where_they_are_judged(depends):
    assert (
        open_baskets(depends, seq_len=4)
        .notes[0]
        .endswith("training users have more than 4 items, which are cut")
    )
    many = [
        "x" + str(i) + "\t" + " ".join(f"lib{n:02}" for n in range(40 - i % 2)) for i in range(40)
    ]
    packed(depends / "recommendation" / "debian12_depends.tsv.gz", ["package\tdepends", *many])
    with pytest.raises(
        UserError, match=r"data.seq_len = 4 is too short for debian_depends: a user has 8 items"
    ):
        open_baskets(depends, seq_len=4, heldout_every=2)
    with pytest.raises(UserError, match="min_items = 1 must be at least 2"):
        open_baskets(depends, min_items=1)


def tone(pitch, length):
    return (8000 * np.sin(2 * np.pi * pitch * np.arange(length) / 8000)).astype(np.int16)


@pytest.fixture
def recordings(tmp_path):
    from scipy.io import wavfile

    path = tmp_path / "speech" / "fsdd_900.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as archive:
        for digit, speaker, index in [
            (d, s, i) for d in range(3) for s in ("ann", "bob") for i in range(8)
        ]:
            data = io.BytesIO()
            wavfile.write(data, 8000, tone(300 * (digit + 1) + 10 * index, 800 + 160 * index))
            member = tarfile.TarInfo(f"recordings/{digit}_{speaker}_{index}.wav")
            member.size = len(data.getvalue())
            archive.addfile(member, io.BytesIO(data.getvalue()))
    return tmp_path


def open_tones(folder, **options):
    options = {
        "seq_len": 8,
        "mel_bins": 20,
        "stack": 3,
        "copies": 1,
        "tempo": 0.1,
        "noise": 0.1,
        "seed": 0,
        **options,
    }
    return speech.open_speech("fsdd", str(folder), **options)


def test_frames_are_stacked_and_standardised_and_the_test_part_is_its_own(recordings):
    data = open_tones(recordings)
    assert data.rows == {"train": 18, "heldout": 30} and data.domains == ("ann", "bob")
    rows = all_train(data)
    assert rows.values_BSP.shape == (18, 8, 60) and data.about.width == 60
    # Index 5 has 1,600 samples = 20 frames of 10 ms = 7 places of 3, the last of them with one
    # frame of zeros.
    assert (
        rows.segment_BS[0].sum() == 7
        and not rows.values_BSP[0, 6, 40:].any()
        and not rows.values_BSP[0, 7].any()
    )
    frames = rows.values_BSP[rows.segment_BS > 0].reshape(-1, 20)
    frames = frames[frames.any(1)]
    assert abs(frames.mean()) < 0.02 and abs(frames.std() - 1) < 0.05
    table = rivals.baseline_figures(data)
    assert table["logistic regression"]["accuracy"] == 1.0 and table["majority"][
        "accuracy"
    ] == pytest.approx(1 / 3)


def test_copies_of_recordings_differ_and_come_again(recordings):
    data, again, other = (open_tones(recordings, copies=2, seed=seed) for seed in (0, 0, 1))
    assert data.rows == {"train": 36, "heldout": 30} and len(data.about.raw["train"][0]) == 18
    first, second = np.split(all_train(data).values_BSP, 2)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(all_train(again).values_BSP, all_train(data).values_BSP)
    assert data.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("opening", "message"),
    [
        (
            open_baskets,
            "neither debian12_depends.tsv.gz nor recommendation/debian12_depends.tsv.gz: .*moe_jax "
            "data debian_depends --from",
        ),
        (
            open_tones,
            "neither fsdd_900.tar.gz nor speech/fsdd_900.tar.gz: .*moe_jax data fsdd --from",
        ),
    ],
)
def test_what_is_missing_says_where_it_is(tmp_path, opening, message):
    with pytest.raises(UserError, match=message):
        opening(tmp_path)
