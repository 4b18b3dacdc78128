"""Sources: the same text from every kind of file, and one clear message for every mistake."""

import gzip
import json
import pathlib
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_jax import extras
from moe_jax.commands import prepare
from moe_jax.data import load, sources
from moe_jax.data.documents import Document
from moe_jax.data.sources.contract import Source
from moe_jax.errors import UserError

TEXTS = ["Él dijo:\n¿qué?\n", "second, with 日本\n", "third"]


def compressed(path, data):
    """Writes bytes as the ending of the name asks for."""
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)


def read(spec):
    return list(sources.read(str(spec)))


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "txt.zst"])
def test_text_files_are_documents_named_by_their_stems(tmp_path, ending):
    for name, text in zip("abc", TEXTS):
        compressed(tmp_path / f"{name}.{ending}", text.encode())
    assert read(f"text:{tmp_path}/*") == [(text, name) for text, name in zip(TEXTS, "abc")]
    assert read(f"prose=text:{tmp_path}/[ab].*") == [(text, "prose") for text in TEXTS[:2]]


def test_a_long_text_file_is_cut_into_documents_and_none_of_it_is_lost(tmp_path):
    text = "".join(
        f"línea {i}\n" + "\n" * (i % 7 == 0) for i in range(150_000)
    )  # more than one block
    (tmp_path / "long.txt").write_text("\ufeff" + text, encoding="utf-8")
    pieces = [document.text for document in read(f"text:{tmp_path}/long.txt")]
    assert "".join(pieces) == text
    assert (
        len(pieces) > 100
        and max(map(len, pieces)) < 33_000
        and all(p.endswith("\n\n") for p in pieces[:-1])
    )


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_json_lines(tmp_path, ending):
    lines = "\n\n".join(
        json.dumps({"body": text, "n": 1}, ensure_ascii=False) for text in [*TEXTS, ""]
    )
    compressed(tmp_path / f"laws.{ending}", lines.encode())
    assert read(f"jsonl:{tmp_path}/*#body") == [(text, "laws") for text in TEXTS]


def test_parquet(tmp_path):
    pq.write_table(pa.table({"text": [*TEXTS, None], "n": [1, 2, 3, 4]}), tmp_path / "web.parquet")
    assert read(f"parquet:{tmp_path}/*.parquet") == [(text, "web") for text in TEXTS]
    assert read(f"x=parquet:{tmp_path}/*.parquet#text") == [(text, "x") for text in TEXTS]


@pytest.mark.parametrize("ending", ["parquet.gz", "parquet.zst"])
def test_compressed_parquet_of_a_dictionary_of_strings(tmp_path, ending):
    categories = pa.array([TEXTS[0], TEXTS[1], None, TEXTS[0]]).dictionary_encode()
    pq.write_table(pa.table({"text": categories, "n": [1, 2, 3, 4]}), tmp_path / "plain")
    compressed(tmp_path / f"web.{ending}", (tmp_path / "plain").read_bytes())
    assert read(f"parquet:{tmp_path}/web.*") == [
        (text, "web") for text in (TEXTS[0], TEXTS[1], TEXTS[0])
    ]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Two datasets on disk: one to be read, one that pretends to be stored as TFRecord."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    rows = [{"text": text, "title": f"t{i}", "label": i % 2} for i, text in enumerate(TEXTS * 4)]
    text, label = tfds.features.Text(), tfds.features.ClassLabel(num_classes=2)
    features = tfds.features.FeaturesDict({"text": text, "title": text, "label": label})
    methods = {
        "VERSION": tfds.core.Version("1.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        ),
        "_split_generators": lambda self, _: {
            "train": enumerate(rows),
            "test": enumerate(rows[:2]),
        },
        "_generate_examples": lambda self: None,
    }
    for name in ("TinyTexts", "TinyRecords"):
        with tfds.core.registered.skip_registration():
            builder = type(
                name, (tfds.core.GeneratorBasedBuilder,), {**methods, "__module__": __name__}
            )
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    info = folder / "tiny_records" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    return folder


def test_tfds_datasets_on_disk(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    assert read("tfds:tiny_texts") == [(text, "tiny_texts") for text in TEXTS * 4]
    assert read("lib=tfds:tiny_texts:test#title") == [("t0", "lib"), ("t1", "lib")]
    assert len(read("tfds:tiny_texts:train[:25%]")) == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "tfds:imdb_reviews",
            "dataset 'imdb_reviews' is not in .*, and nothing is downloaded here: prepare it where",
        ),
        (
            "tfds:tiny_records",
            "dataset tiny_records is stored as tfrecord, which needs TensorFlow: convert it",
        ),
        ("tfds:tiny_texts:dev", "dataset tiny_texts, split 'dev': Unknown split 'dev'"),
        (
            "tfds:tiny_texts#body",
            r"has no text feature 'body' \(text features: text, title\); name one after a #",
        ),
        ("tfds:tiny_texts#label", "has no text feature 'label'"),
    ],
)
def test_a_wrong_tfds_dataset_is_one_message(tfds_folder, monkeypatch, spec, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    with pytest.raises(UserError, match=message):
        read(spec)


def test_embedded_domains_can_be_chosen_and_labelled():
    chosen = read("embedded:verse,drama")
    assert list(dict.fromkeys(document.domain for document in chosen)) == ["verse", "drama"]
    assert {document.domain for document in read("poems=embedded:verse")} == {"poems"}


def read_numbers(argument):
    """Yields a document for each number up to the argument, and an empty one before them."""
    yield Document("", "none")
    for number in range(int(argument)):
        yield Document(f"number {number}\n", "even" if number % 2 == 0 else "odd")


NUMBERS = Source(
    argument_syntax=":HOW_MANY", needs_argument=True, packed_by_run=False, read=read_numbers
)


def test_a_source_that_is_registered_is_all_there_is_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sources.SOURCES, "numbers", NUMBERS)
    assert read("numbers:2") == [("number 0\n", "even"), ("number 1\n", "odd")]
    assert read("all=numbers:2") == [("number 0\n", "all"), ("number 1\n", "all")]
    with pytest.raises(UserError, match=r"'numbers' names nothing after numbers: .*numbers:HOW_M"):
        read("numbers")
    with pytest.raises(UserError, match="'numbers:0' has no text: every document of it is empty"):
        read("numbers:0")
    with pytest.raises(UserError, match=r"is none of: embedded.* numbers:HOW_MANY, each with an"):
        read("digits:2")
    with pytest.raises(SystemExit):
        prepare.parse(["--help"])
    assert "numbers:HOW_MANY" in capsys.readouterr().out


def test_a_source_needs_the_extra_that_it_declares(monkeypatch):
    needy = NUMBERS._replace(extra_modules=("never_heard_of",))
    monkeypatch.setitem(sources.SOURCES, "numbers", needy)
    monkeypatch.setitem(extras.DISTRIBUTIONS, "never_heard_of", "never-heard-of")
    with pytest.raises(UserError, match=r"source 'numbers:2' needs never-heard-of \(not installed"):
        read("numbers:2")


def test_a_run_packs_a_source_that_says_so_and_no_other(monkeypatch):
    sizes = {"seq_len": 8, "slice_bytes": 0, "heldout_bytes": 0, "heldout_every": 2, "seed": 0}
    monkeypatch.setitem(sources.SOURCES, "numbers", NUMBERS)
    with pytest.raises(
        UserError, match=r"'numbers:8' must be prepared first: .*--source 'numbers:"
    ):
        load.open_dataset([("numbers:8", 1.0)], **sizes)
    monkeypatch.setitem(sources.SOURCES, "numbers", NUMBERS._replace(packed_by_run=True))
    opened = load.open_dataset([("numbers:8", 1.0)], **sizes)
    assert opened.domains == ("even", "odd") and opened.documents("heldout") == {
        "even": 2,
        "odd": 2,
    }
    with pytest.raises(UserError, match=r"nor embedded\[:DOMAIN,...\] or numbers:HOW_MANY"):
        load.open_dataset([("nowhere", 1.0)], **sizes)


@pytest.mark.parametrize("kind", sources.SOURCES)
def test_the_syntax_of_a_source_shows_whether_it_needs_an_argument(kind):
    source = sources.SOURCES[kind]
    assert source.argument_syntax.startswith(":" if source.needs_argument else "[:")


FILES = {
    "latin.txt": "señor".encode("latin1"),
    "latin.jsonl": b'{"text": "se\xf1or"}\n',
    "broken.txt.gz": gzip.compress(b"a" * 9999 + bytes(range(256)) * 50)[:-300],
    "broken.txt.zst": pa.compress(bytes(range(256)) * 50, codec="zstd", asbytes=True)[:-30],
    "noise.txt.gz": b"not a gzip file",
    "noise.parquet": b"not a parquet file",
    "empty.txt": b"",
    "empty.jsonl": b"\n\n",
    "fields.jsonl": b'{"text": "a"}\n{"txet": "b", "n": 1}\n',
    "number.jsonl": b'{"text": 7}\n',
    "list.jsonl": b'["text"]\n',
    "syntax.jsonl": b'{"text": "a"}\n{"text": "b"\n',
    "half.jsonl": b'{"text": "a\\ud83d"}\n',
    "deep.jsonl": b'{"text": "a"}\n{"text": ' + b"[" * 200_000 + b"\n",
    "digits.jsonl": b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n",
    "noise.parquet.gz": gzip.compress(b"not a parquet file"),
    "broken.parquet.zst": pa.compress(bytes(range(256)) * 50, codec="zstd", asbytes=True)[:-30],
}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text:{}/nothing*", "source text:.*nothing.* matches no file"),
        (
            "text:{}/latin.txt",
            r"latin.txt is not UTF-8 \(byte 0xf1 after 'se'\): convert it from what it is written "
            r"in, as in `iconv -f",
        ),
        ("jsonl:{}/latin.jsonl", r"latin.jsonl is not UTF-8 \(byte 0xf1 after '.*se'\)"),
        (
            "text:{}/broken.txt.gz",
            "broken.txt.gz cannot be read, it is truncated .*: copy it again",
        ),
        (
            "text:{}/broken.txt.zst",
            "broken.txt.zst cannot be read, it is truncated .*: copy it again",
        ),
        ("text:{}/noise.txt.gz", "noise.txt.gz cannot be read, it may be damaged"),
        ("parquet:{}/noise.parquet", "noise.parquet cannot be read, it may be damaged"),
        (
            "parquet:{}/table.parquet#body",
            r"table.parquet has no text column 'body' \(it has: text \(string\), n \(int64\)\)",
        ),
        ("parquet:{}/noise.parquet.gz", "noise.parquet.gz cannot be read, it may be damaged"),
        (
            "parquet:{}/broken.parquet.zst",
            "broken.parquet.zst cannot be read, it is truncated .*: copy it again",
        ),
        ("parquet:{}/table.parquet#n", "table.parquet has no text column 'n'"),
        (
            "text:{}/empty.txt",
            "source 'text:.*empty.txt' has no text: every document of it is empty",
        ),
        ("jsonl:{}/empty.jsonl", "has no text: every document of it is empty"),
        (
            "jsonl:{}/fields.jsonl",
            r"fields.jsonl, line 2 has no text in field 'text' \(it has: txet, n\); name the field",
        ),
        (
            "jsonl:{}/number.jsonl",
            r"number.jsonl, line 1 has no text in field 'text' \(it has: text\)",
        ),
        ("jsonl:{}/list.jsonl", r"list.jsonl, line 1 has no text in field 'text' \(it has: list\)"),
        (
            "jsonl:{}/syntax.jsonl",
            "syntax.jsonl, line 2 is not JSON: Expecting ',' delimiter at column",
        ),
        (
            "jsonl:{}/half.jsonl",
            "half.jsonl, line 1 is no valid Unicode: half a surrogate pair at character 1",
        ),
        (
            "jsonl:{}/deep.jsonl",
            "deep.jsonl, line 2 is JSON beyond what Python reads .*: mend or drop the line",
        ),
        ("jsonl:{}/digits.jsonl", "digits.jsonl, line 1 is JSON beyond what Python reads"),
        ("web:{}/a.html", "source 'web:.*' is none of: embedded"),
        ("text:", "source 'text:' names nothing after text"),
        (
            "embedded:opera",
            "source embedded has no domain 'opera'; choose each at most once from drama, verse",
        ),
        ("embedded:drama,drama", "source embedded names a domain twice: drama,drama"),
    ],
)
def test_a_wrong_source_is_one_message(tmp_path, spec, message):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "table.parquet")
    with pytest.raises(UserError, match=message):
        read(spec.format(tmp_path))


IMPORTS = """
import importlib, sys, threading
sys.setswitchinterval(1e-5)
wrong, ended = [], False
# A progress bar imports what it needs when it needs it, by relative imports.
def draw():
    while not ended and not wrong:
        sys.modules.pop("email.mime.text", None)
        try:
            importlib.import_module("email.mime.text")
        except Exception as error:
            wrong.append(repr(error))
thread = threading.Thread(target=draw)
thread.start()
from moe_jax.data.tfds_import import tfds
tfds.core.GeneratorBasedBuilder
ended = True
thread.join()
sys.exit("".join(wrong) or 0)
"""


def test_a_thread_that_imports_is_not_disturbed_by_the_import_of_tfds():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_else_imports_tfds():
    """So that no other import of it disturbs other threads."""
    found = [
        path.name
        for path in pathlib.Path("moe_jax").rglob("*.py")
        if "import tensorflow_datasets" in path.read_text()
    ]
    assert found == ["tfds_import.py"]


def test_damaged_records_of_a_dataset_are_one_message(tfds_folder, tmp_path, monkeypatch):
    shutil.copytree(tfds_folder / "tiny_texts", tmp_path / "tiny_texts")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for path in (tmp_path / "tiny_texts").rglob("*"):
        if not path.is_file() or "test" in path.name:
            continue
        whole = path.read_bytes()
        for place in (0, 20, len(whole.rstrip(b"\0")) // 2, len(whole.rstrip(b"\0")) - 2):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
            try:
                assert read("tfds:tiny_texts") == [(text, "tiny_texts") for text in TEXTS * 4]
            except UserError as error:
                assert "damaged" in str(error) or "tiny_texts" in str(error)
        path.write_bytes(whole)
