"""VADER's text, banking77's csv, Fashion-MNIST's idx files, recordings and Bibles become what the
readers take.
"""

import gzip
import importlib.machinery
import io
import re
import sys
import tarfile
import types

import numpy as np
import pytest
from publisher_command import data, refusal, sha256, unpacked

from moe_jax.data.publishers import banking77, fsdd, vader
from moe_jax.tasks.classification import data as classification
from moe_jax.tasks.speech import data as speech
from moe_jax.tasks.translation import data as translation
from moe_jax.tasks.vision import data as vision


def test_vader_is_read_from_its_archive(tmp_path, capsys, monkeypatch):
    line = b"1_1\t2.26666666667\tA lovely film. \r\n2\t-0.6\tbad\r\n"
    domains = {domain: (name, sha256(line)) for domain, (name, _) in vader.DOMAINS.items()}
    monkeypatch.setattr(vader, "DOMAINS", domains)
    archive = tmp_path / "hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, _ in domains.values():
            member = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}")
            member.size = len(line)
            tar.addfile(member, io.BytesIO(line))
    assert data(capsys, "vader", "--from", archive, "--out", tmp_path)[0] == 0
    rows = unpacked(tmp_path / "classification" / "vader_sentiment_4domains.tsv.gz").splitlines()
    assert (
        rows[:3] == ["domain\tvalence\ttext", "movie\t2.267\tA lovely film.", "movie\t-0.6\tbad"]
        and len(rows) == 9
    )
    assert len(list(classification.read_vader(str(tmp_path)))) == 8
    archive.write_bytes(archive.read_bytes()[:-40])
    assert "cannot be read, it may be damaged" in refusal(
        capsys, "vader", "--from", archive, "--out", tmp_path
    )


def test_banking77_is_packed_and_its_sums_are_compared(tmp_path, capsys, monkeypatch):
    files = {
        "train": b'text,category\n"Where, please?",card\n',
        "test": b"text,category\nHow?\n,pin\n",
    }
    folder = tmp_path / "banking_data"
    folder.mkdir()
    for part, content in files.items():
        (folder / f"{part}.csv").write_bytes(content)
    line = refusal(capsys, "banking77", "--from", folder, "--out", tmp_path)
    assert (
        f"train.csv has the sha256 sum {sha256(files['train'])}, its publisher's file has b06e26ac"
        in line
    )
    monkeypatch.setattr(
        banking77, "DIGESTS", {part: sha256(content) for part, content in files.items()}
    )
    assert data(capsys, "banking77", "--from", *folder.iterdir(), "--out", tmp_path)[0] == 0
    assert (
        unpacked(tmp_path / "classification" / "banking77_train.csv.gz").encode() == files["train"]
    )
    assert next(iter(classification.read_banking77(str(tmp_path)))).split == "heldout"
    (folder / "train.csv").write_bytes(b"question,intent\na,b\n")
    line = refusal(
        capsys, "banking77", "--from", folder, "--out", tmp_path / "other", "--any_digest"
    )
    assert "train.csv has the columns question, intent, not text, category" in line


def idx(array):
    head = bytes((0, 0, 8, array.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def clothes(tmp_path):
    folder = tmp_path / "fashion"
    folder.mkdir()
    for part, number in (("train", 3), ("t10k", 2)):
        images = np.arange(number * 784).reshape(number, 28, 28) % 251
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(number)))
    return folder


def test_fashion_mnist_is_read_plain_and_packed(clothes, tmp_path, capsys):
    command = ("fashion_mnist", "--from", clothes, "--out", tmp_path / "data")
    line = refusal(capsys, *command)
    assert (
        "has the md5 sum" in line
        and "8d4fb7e6c68d591d4c3dfef9ec88bf0d" in line
        and "--any_digest" in line
    )
    assert data(capsys, *command, "--any_digest")[0] == 0
    images = vision.read_fashion_mnist(str(tmp_path / "data"), 5)
    assert images.pixels_NHWC.shape == (5, 28, 28, 1) and images.label_N.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t10k-labels-idx1-ubyte",
            idx(np.arange(2))[:-1],
            "holds 9 bytes, but its head says 10: it was cut",
        ),
        ("t10k-labels-idx1-ubyte", idx(np.arange(3)), "has 2 images, but .* 3 labels"),
        (
            "t10k-labels-idx1-ubyte",
            idx(np.ones((2, 1))),
            "is no idx file of bytes with 1 dimensions",
        ),
        ("t10k-labels-idx1-ubyte", b"", "is no idx file"),
        ("t10k-images-idx3-ubyte.gz", b"no gzip", "cannot be read, it may be damaged"),
    ],
)
def test_an_idx_file_that_is_none_is_refused(clothes, tmp_path, capsys, name, content, message):
    (clothes / name).write_bytes(content)
    line = refusal(
        capsys, "fashion_mnist", "--from", clothes, "--out", tmp_path / "data", "--any_digest"
    )
    assert re.search(message, line), line


def test_the_recordings_of_the_figures_are_taken(tmp_path, capsys, monkeypatch):
    from scipy.io import wavfile

    monkeypatch.setattr(fsdd, "SPEAKERS", 1)
    folder = tmp_path / "recordings"
    folder.mkdir()
    for digit in range(10):
        for index in range(16):
            wavfile.write(folder / f"{digit}_theo_{index}.wav", 8000, np.full(80, index, np.int16))
    assert data(capsys, "fsdd", "--from", folder, "--out", tmp_path / "data")[0] == 0
    found = speech.read_fsdd(str(tmp_path / "data"))
    assert len(found) == 150 and sum(recording.heldout for recording in found) == 50
    assert {recording.wave[0] for recording in found} == set(range(15))
    wav = folder / "3_theo_7.wav"
    wav.write_bytes(wav.read_bytes()[:-2])
    line = refusal(capsys, "fsdd", "--from", folder, "--out", tmp_path / "other")
    assert "3_theo_7.wav holds 202 bytes, but its head says 204: it was cut" in line
    wav.unlink()
    line = refusal(capsys, "fsdd", "--from", folder, "--out", tmp_path / "other")
    assert "holds 149 of 150 recordings" in line


def fake_pysword(monkeypatch, texts):
    """Puts a module in the place of pysword that has one book, with these texts by chapter and
    verse.
    """
    book = types.SimpleNamespace(name="Acts", chapter_lengths=[2, 0, 0, 0, 0, 0, 0, 37])
    structure = types.SimpleNamespace(get_books=lambda: {"nt": [book]})

    class Modules:
        def __init__(self, path):
            pass

        def parse_modules(self):
            return {name: {"version": "1"} for name in texts}

        def get_bible_from_module(self, name):
            def get(books, chapters, verses):
                return texts[name].get((chapters, verses), "")

            return types.SimpleNamespace(get=get, get_structure=lambda: structure)

    module = types.ModuleType("pysword.modules")
    module.SwordModules = Modules
    package = types.ModuleType("pysword")
    package.__spec__ = importlib.machinery.ModuleSpec("pysword", None)
    monkeypatch.setitem(sys.modules, "pysword", package)
    monkeypatch.setitem(sys.modules, "pysword.modules", module)


def test_the_bible_is_aligned_by_verse(tmp_path, capsys, monkeypatch):
    english = {(1, 1): "¶ In the  beginning \n", (1, 2): "No twin", (8, 37): "disputed"}
    spanish = {(1, 1): "En el principio", (8, 37): "disputado"}
    fake_pysword(monkeypatch, {"engKJV2006eb": english, "spaRV1909eb": spanish})
    assert data(capsys, "bible_en_es", "--from", tmp_path, "--out", tmp_path / "data")[0] == 0
    path = tmp_path / "data" / "translation" / "bible_kjv_rv1909_en_es.tsv.gz"
    assert unpacked(path) == "Acts 1:1\tIn the beginning\tEn el principio\n"
    assert [pair.source for pair in translation.read_bible(str(tmp_path / "data"))] == [
        "In the beginning"
    ]


def test_what_the_bible_needs_is_told(tmp_path, capsys, monkeypatch):
    fake_pysword(monkeypatch, {"engKJV2006eb": {}})
    command = ("bible_en_es", "--from", tmp_path, "--out", tmp_path / "data")
    assert "has no SWORD module spaRV1909eb" in refusal(capsys, *command)
    monkeypatch.setitem(sys.modules, "pysword", None)
    assert "bible_en_es needs pysword (not installed)" in refusal(capsys, *command)
