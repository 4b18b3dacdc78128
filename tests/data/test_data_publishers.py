"""WordNet's files become what the reader takes; where they come from is recorded; what is wrong is
told in one line.
"""

import bz2
import gzip
import importlib
import json
import lzma
import re
import tarfile
import zipfile

import numpy as np
import pytest
from publisher_command import data, refusal, sha256, unpacked

from moe_jax.data.publishers import table
from moe_jax.tasks.classification import data as classification
from moe_jax.tasks.recommendation import data as recommendation
from moe_jax.tasks.speech import data as speech
from moe_jax.tasks.translation import data as translation
from moe_jax.tasks.vision import data as vision

LICENCE = (
    "  1 This software and database is being provided to you  \n"
    "  2 WordNet 3.0 Copyright 2006 by Princeton  \n"
)
SYNSETS = {
    "noun": [
        (3, "01 entity 0", "~", "that which is perceived"),
        (6, "02 abstract_entity 0 whole 1", "@", 'an entity; "a, b"'),
    ],
    "verb": [(29, "01 breathe 0", "+", "draw air")],
    "adj": [(0, "01 able(p) 0", "&", "having the means")],
    "adv": [(2, "01 well 0", "!", "in a good manner")],
}


def wordnet_file(letter, synsets, licence=LICENCE):
    """A data file whose synsets each point to the last one."""
    heads = [f" {lex:02d} {letter} {words} 001" for lex, words, *_ in synsets]
    tails = [f" {letter} 0000 | {gloss}  \n" for *_, gloss in synsets]
    sizes = [8 + len(head) + 3 + 8 + len(tail) for head, tail in zip(heads, tails)]
    places = np.cumsum([len(licence), *sizes])
    lines = [
        f"{place:08d}{head} {pointer} {places[-2]:08d}{tail}"
        for place, head, tail, (_, _, pointer, _) in zip(places, heads, tails, synsets)
    ]
    return licence + "".join(lines)


@pytest.fixture
def wordnet(tmp_path):
    folder = tmp_path / "dict"
    folder.mkdir()
    for part, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        (folder / f"data.{part}").write_text(wordnet_file(letter, SYNSETS[part]))
    return folder


def test_wordnet_is_converted_and_read(wordnet, tmp_path, capsys):
    code, out, _ = data(capsys, "wordnet", "--from", wordnet, "--out", tmp_path / "data")
    path = tmp_path / "data" / "classification" / "wordnet30_supersense.tsv.gz"
    assert code == 0 and f"wrote {path}" in out and "5 synsets of WordNet 3.0" in out
    assert unpacked(path).splitlines() == [
        "supersense\twords\tgloss",
        "noun.Tops\tentity\tthat which is perceived",
        'noun.artifact\tabstract entity, whole\tan entity; "a, b"',
        "verb.body\tbreathe\tdraw air",
        "adj.all\table(p)\thaving the means",
        "adv.all\twell\tin a good manner",
    ]
    assert [text.label for text in classification.read_wordnet(str(tmp_path / "data"))][
        1
    ] == "noun.artifact"


def test_a_record_says_where_data_comes_from(wordnet, tmp_path, capsys):
    data(capsys, "wordnet", "--from", wordnet, "--out", tmp_path / "data")
    path = tmp_path / "data" / "classification" / "wordnet30_supersense.tsv.gz"
    record = json.loads(path.with_name(path.name + ".source.json").read_text())
    noun = (wordnet / "data.noun").read_bytes()
    assert record["dataset"] == "wordnet" and record["sha256_unpacked"] == sha256(
        gzip.decompress(path.read_bytes())
    )
    assert record["sources"][0] == {
        "name": "data.noun",
        "size": len(noun),
        "sha256": sha256(noun),
        "checked": "",
    }
    assert sorted(file.name for file in path.parent.iterdir()) == [
        path.name,
        path.name + ".source.json",
    ]


def test_the_same_bytes_come_out_whatever_holds_the_files(wordnet, tmp_path, capsys):
    files = {file.name: file.read_bytes() for file in wordnet.glob("data.*")}
    with tarfile.open(tmp_path / "WNdb-3.0.tar.gz", "w:gz") as archive:
        archive.add(wordnet, "dict")
    with zipfile.ZipFile(tmp_path / "wordnet.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"wordnet/{name}", content)
    packed = tmp_path / "packed"
    packed.mkdir()
    for (name, content), (ending, pack) in zip(
        files.items(),
        ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), ("", bytes)),
    ):
        (packed / (name + ending)).write_bytes(pack(content))
    written = set()
    for i, given in enumerate(
        (wordnet, tmp_path / "WNdb-3.0.tar.gz", tmp_path / "wordnet.zip", packed)
    ):
        assert data(capsys, "wordnet", "--from", given, "--out", tmp_path / f"out{i}")[0] == 0
        written.add(
            (tmp_path / f"out{i}" / "classification" / "wordnet30_supersense.tsv.gz").read_bytes()
        )
    assert len(written) == 1


def test_what_is_there_is_kept(wordnet, tmp_path, capsys):
    command = ("wordnet", "--from", wordnet, "--out", tmp_path)
    data(capsys, *command)
    path = tmp_path / "classification" / "wordnet30_supersense.tsv.gz"
    before = path.stat().st_mtime_ns
    code, out, _ = data(capsys, *command)
    assert (
        code == 0
        and f"{path} is there already, with this content" in out
        and path.stat().st_mtime_ns == before
    )
    path.write_bytes(gzip.compress(b"a user's own\n"))
    assert refusal(capsys, *command).startswith(
        f"error: {path} is there already and holds something else: move it"
    )
    path.write_bytes(b"no gzip")
    assert "holds something else" in refusal(capsys, *command)


def test_a_wordnet_file_that_is_cut_or_changed_is_refused(wordnet, tmp_path, capsys):
    command = ("wordnet", "--from", wordnet, "--out", tmp_path / "data")
    noun = wordnet / "data.noun"
    whole = noun.read_text()
    for content, message in (
        (whole[:-10], "ends within a line: the file was cut"),
        (whole[: whole.rindex("0000") - 50], "ends within a line"),
        (
            "".join(whole.splitlines(keepends=True)[:3]),
            "ends at byte .* has a synset at byte .*: the file was cut",
        ),
        (whole.replace("entity 0", "entities 0"), "line 4 is no synset at byte .* changed or cut"),
        (whole.replace("\n", "\r\n"), "is no synset"),
        (LICENCE, "has no synset: the file was cut"),
        ("<html>404</html>", "does not begin with the licence of WordNet 3.0 or 3.1"),
        ("", "does not begin with the licence"),
    ):
        noun.write_bytes(content.encode())
        line = refusal(capsys, *command)
        assert str(noun) in line and re.search(message, line), line
    noun.write_bytes(whole.encode()[:-3] + b"\xff\n")
    assert "is not UTF-8 at byte" in refusal(capsys, *command)
    assert not (tmp_path / "data").exists()


def test_an_index_tells_what_is_missing_at_the_end(wordnet, tmp_path, capsys):
    command = ("wordnet", "--from", wordnet, "--out", tmp_path / "data")
    size = (wordnet / "data.adv").stat().st_size
    index = wordnet / "index.adv"
    index.write_text(f"  1 licence  \nwell r 2 0 2 0 {len(LICENCE):08d} {size:08d}  \n")
    assert f"data.adv ends at byte {size}, but has a synset at byte {size}" in refusal(
        capsys, *command
    )
    index.write_text("<html>\n")
    assert "index.adv is no index file of WordNet" in refusal(capsys, *command)
    index.write_text(f"well r 1 0 1 0 {len(LICENCE):08d}  \n")
    assert data(capsys, *command)[0] == 0


def test_another_edition_is_told(wordnet, tmp_path, capsys):
    for part, letter in (("noun", "n"), ("verb", "v"), ("adj", "a"), ("adv", "r")):
        text = wordnet_file(
            letter, SYNSETS[part], LICENCE.replace("3.0 Copyright 2006", "3.1 Copyright 2011")
        )
        (wordnet / f"data.{part}").write_text(text)
    _, out, _ = data(capsys, "wordnet", "--from", wordnet, "--out", tmp_path / "data")
    assert "the figures of docs/tasks.md are of WordNet 3.0: yours will differ" in out


def test_the_list_has_every_set_of_the_tasks(capsys):
    code, out, _ = data(capsys)
    listed = {line.split()[0] for line in out if line and not line.startswith(" ")}
    readers = [
        classification.DATASETS,
        translation.DATASETS,
        vision.DATASETS,
        recommendation.DATASETS,
        speech.DATASETS,
    ]
    assert code == 0 and listed == {name for datasets in readers for name in datasets} | {
        "tfds:NAME"
    }
    assert (
        sum(line.startswith("  licence") for line in out)
        == sum(line.startswith("  where") for line in out)
        == 12
    )


@pytest.mark.parametrize(
    "name", [name for name, published in table.SETS.items() if published.config]
)
def test_the_config_that_is_named_learns_the_set(name):
    path, _, variant = table.SETS[name].config.partition(":")
    spec = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = spec.get_config(variant) if variant else spec.get_config()
    assert config.tasks[config.task].dataset == name


def test_flags_that_cannot_work_are_one_line(tmp_path, capsys):
    assert "no set 'mnist': choose one of wordnet, debian" in refusal(
        capsys, "mnist", "--from", tmp_path
    )
    assert "data wordnet needs --from FILE|DIR" in refusal(capsys, "wordnet")
    assert "neither a file nor a folder" in refusal(
        capsys, "wordnet", "--from", tmp_path / "nowhere"
    )
    line = refusal(capsys, "wordnet", "--from", tmp_path)
    assert (
        "holds no file data.noun, plain or packed: `python -m moe_jax data` lists what to give"
        in line
    )
    (tmp_path / "wordnet.deb").write_bytes(b"!<arch>")
    line = refusal(capsys, "wordnet", "--from", tmp_path / "wordnet.deb")
    assert "is a Debian package: `dpkg-deb -x" in line
    (tmp_path / "x.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    assert f"not opened, name them: {tmp_path / 'x.zip'}" in refusal(
        capsys, "wordnet", "--from", tmp_path
    )
    assert "holds no file" in refusal(capsys, "wordnet", "--from", tmp_path / "x.zip")


def test_an_output_that_cannot_be_written_is_one_line(wordnet, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    line = refusal(capsys, "wordnet", "--from", wordnet, "--out", tmp_path / "file")
    assert "cannot be written" in line and "choose another --out" in line
