"""Small files in the formats of the sets that the tasks read, with as many classes and items as
configs/ has: for runs of a few steps.
"""

import csv
import gzip
import io

import numpy as np
from scipy.io import wavfile
from task_files import packed

WORDS = np.array(
    "time river stone light music paper garden window bridge letter morning city horse ship winter "
    "table".split()
)


def write(folder):
    """One folder, as for data.folder, with every set that needs no TFDS."""
    rng = np.random.default_rng(0)
    text = folder / "classification"
    _labelled(text / "wordnet30_supersense.tsv.gz", rng, 45, ("sense{}", "word"))
    _labelled(text / "debian12_descriptions_by_section.tsv.gz", rng, 20, ("section{}", "package"))
    rated = [f"film\t{2 - 4 * (i % 2)}\t{_sentence(rng, i)}" for i in range(300)]
    packed(text / "vader_sentiment_4domains.tsv.gz", ["domain\tvalence\ttext", *rated])
    for part, number in (("train", 5), ("test", 1)):
        _intents(text / f"banking77_{part}.csv.gz", rng, part, number)
    verses = [(f"Genesis {i // 4}:{i % 4 + 1}", _sentence(rng, i)) for i in range(400)]
    translated = folder / "translation"
    packed(
        translated / "bible_kjv_rv1909_en_es.tsv.gz",
        [f"{at}\t{said}\t{said[::-1]}" for at, said in verses],
    )
    packed(translated / "ddtp_en_de.tsv.gz", [f"{said}\t{said[::-1]}" for _, said in verses])
    _baskets(folder / "recommendation" / "debian12_depends.tsv.gz", rng)
    _recordings(folder / "speech" / "recordings")
    _images(folder / "fashion_mnist", rng)


def _sentence(rng, number):
    return f"{' '.join(rng.choice(WORDS, 6))} {number}."


def _labelled(path, rng, classes, columns):
    """Lines of label, a name and a text; 20 of each class."""
    label, name = columns
    lines = [
        f"{label.format(i % classes)}\t{name}{i}\t{_sentence(rng, i)}" for i in range(20 * classes)
    ]
    packed(path, ["label\tname\ttext", *lines])


def _intents(path, rng, part, number):
    text = io.StringIO()
    rows = [(_sentence(rng, f"{part}{i}"), f"intent{i % 77}") for i in range(77 * number)]
    csv.writer(text).writerows([("text", "category"), *rows])
    path.write_bytes(gzip.compress(text.getvalue().encode()))


def _baskets(path, rng):
    """The 2,057 libraries and 1,112 other packages of configs/recommendation.py, each wanted by 14
    users.
    """
    items = np.array([f"lib{i:04}" for i in range(2057)] + [f"tool{i:04}" for i in range(1112)])
    users = [user for _ in range(14) for user in np.array_split(rng.permutation(items), 130)]
    packed(path, ["package\tdepends", *(f"p{i}\t{' '.join(user)}" for i, user in enumerate(users))])


def _recordings(folder):
    """Ten digits as tones by two speakers: five recordings each of the test part, and three to
    learn from.
    """
    folder.mkdir(parents=True)
    for digit in range(10):
        for number in range(16):
            turns = 2 * np.pi * np.arange(1600) * (200 * (digit + 1) + 5 * number) / 8000
            name = f"{digit}_{('ann', 'bob')[number % 2]}_{number // 2}.wav"
            wavfile.write(folder / name, 8000, (8000 * np.sin(turns)).astype(np.int16))


def _images(folder, rng):
    """Fashion-MNIST's idx files with noise for images."""
    folder.mkdir()

    def head(*shape):
        return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()

    for part, number in (("train", 400), ("t10k", 60)):
        pixels = rng.integers(0, 256, (number, 28, 28)).astype(np.uint8)
        labels = np.arange(number).astype(np.uint8) % 10
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            path = folder / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(head(*array.shape) + array.tobytes(), 1))
