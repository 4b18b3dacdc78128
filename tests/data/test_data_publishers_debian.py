"""Debian's indices become descriptions, dependencies and pairs; the sums of a release are
compared.
"""

import bz2
import lzma
import re

import pyarrow
import pytest
from publisher_command import data, refusal, sha256, unpacked

from moe_jax.tasks.classification import data as classification
from moe_jax.tasks.recommendation import data as recommendation
from moe_jax.tasks.translation import data as translation

PACKAGES = """\
Package: zoo
Architecture: amd64
Depends: libc6 (>= 2.4), python3:any | python3.9, libb, libb (<< 2)
Description: short
Description-md5: aaa
Section: games

Package: ant
Description-md5: bbb
Section: libs

Package: copy-of-zoo
Description-md5: aaa
Section: doc

"""
ENGLISH = """\
Package: zoo
Description-md5: aaa
Description-en: A zoo\x20
 It has many
 animals.
 .
 More of\tit.

Package: ant
Description-md5: bbb
Description-en: An ant
 Same in both.

"""
GERMAN = """\
Package: zoo
Description-md5: aaa
Description-de: Ein Zoo
 Er hat viele
 Tiere.
 .
 Mehr.

Package: ant
Description-md5: bbb
Description-de: Eine Ameise
 Same in both.

Package: gone
Description-md5: ccc
Description-de: Weg

"""


@pytest.fixture
def indices(tmp_path):
    folder = tmp_path / "bookworm"
    folder.mkdir()
    (folder / "Packages.xz").write_bytes(lzma.compress(PACKAGES.encode()))
    (folder / "Translation-en.xz").write_bytes(lzma.compress(ENGLISH.encode()))
    (folder / "Translation-de.bz2").write_bytes(bz2.compress(GERMAN.encode()))
    return folder


def release(folder, *names, codename="bookworm"):
    sums = "".join(f" {sha256((folder / n).read_bytes())} 123 main/x/{n}\n" for n in names)
    (folder / "InRelease").write_text(f"Codename: {codename}\nVersion: 12.15\nSHA256:\n{sums}")


def test_debians_indices_become_three_sets(indices, tmp_path, capsys):
    out = tmp_path / "data"
    for name in ("debian", "debian_depends", "debian_en_de"):
        code, told, _ = data(capsys, name, "--from", indices, "--out", out)
        assert code == 0 and any("nothing was compared with Debian's sums" in line for line in told)
    sections = unpacked(
        out / "classification" / "debian12_descriptions_by_section.tsv.gz"
    ).splitlines()
    assert sections == [
        "section\tpackage\tdescription",
        "libs\tant\tAn ant Same in both.",
        "doc\tcopy-of-zoo\tA zoo It has many animals. More of it.",
    ], "by name; of equal descriptions the first; no tab within a cell"
    depends = unpacked(out / "recommendation" / "debian12_depends.tsv.gz")
    assert depends == "package\tdepends\nzoo\tlibb libc6 python3\n"
    pairs = unpacked(out / "translation" / "ddtp_en_de.tsv.gz").splitlines()
    assert pairs == [
        "A zoo\tEin Zoo",
        "An ant\tEine Ameise",
        "It has many animals.\tEr hat viele Tiere.",
    ]
    assert next(iter(classification.read_debian(str(out)))).label == "libs"
    assert recommendation.read_debian_depends(str(out)) == {"zoo": ["libb", "libc6", "python3"]}
    assert next(translation.DATASETS["debian_en_de"].read(str(out))).target == "Ein Zoo"


def test_debians_sums_are_compared_where_a_release_is_given(indices, tmp_path, capsys):
    command = ("debian_depends", "--from", indices, "--out", tmp_path / "data")
    release(indices, "Packages.xz")
    code, out, _ = data(capsys, *command)
    digest = sha256((indices / "Packages.xz").read_bytes())
    assert code == 0 and f"read Packages.xz, whose sha256 {digest} is right" in out
    assert out[3].startswith("1 packages") and "Debian 12.15 (bookworm)" in out[4]
    (indices / "Packages.xz").write_bytes(lzma.compress(PACKAGES.replace("libb", "libd").encode()))
    release(indices, "Translation-en.xz", "Translation-de.bz2")
    assert "Packages.xz has the sha256 sum" in refusal(capsys, *command)
    assert data(capsys, *command[:-1], tmp_path / "other", "--any_digest")[0] == 0
    (indices / "InRelease").write_text("<html>")
    assert "InRelease has no sha256 sums" in refusal(capsys, *command)


def test_another_release_of_debian_is_told(indices, tmp_path, capsys):
    release(indices, "Packages.xz", codename="trixie")
    _, out, _ = data(capsys, "debian_depends", "--from", indices, "--out", tmp_path)
    assert (
        "Debian 12.15 (trixie); the figures of docs/tasks.md are of bookworm: yours will differ"
        in out
    )


def test_aptss_lists_are_taken_by_their_names(indices, tmp_path, capsys):

    lists = tmp_path / "lists"
    lists.mkdir()
    prefix = "deb.debian.org_debian_dists_bookworm_main_"
    frame = pyarrow.CompressedOutputStream(str(lists / f"{prefix}binary-amd64_Packages.lz4"), "lz4")
    frame.write(PACKAGES.encode())
    frame.close()
    assert data(capsys, "debian_depends", "--from", lists, "--out", tmp_path)[0] == 0
    (lists / "deb.debian.org_debian-security_main_binary-amd64_Packages").write_text(PACKAGES)
    line = refusal(capsys, "debian_depends", "--from", lists, "--out", tmp_path)
    assert "holds 2 files Packages or *_Packages" in line and line.endswith(
        "name one of them with --from FILE"
    )
    one = lists / f"{prefix}binary-amd64_Packages.lz4"
    assert data(capsys, "debian_depends", "--from", one, "--out", tmp_path)[0] == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "Packages.xz",
            lzma.compress(PACKAGES.encode())[:-20],
            "Packages.xz cannot be read, it may be damaged",
        ),
        (
            "Packages.xz",
            lzma.compress(PACKAGES.encode()[:-9]),
            "does not end with an empty line: it was cut",
        ),
        ("Packages.xz", lzma.compress(b"no index\n\n"), "paragraph 1 has no field Package"),
        ("Packages.xz", lzma.compress(b"Package: \xff\n\n"), "Packages.xz is not UTF-8 at byte 9"),
        ("Packages.xz", b"", "Packages.xz .*(damaged|empty line)"),
        (
            "Translation-en.xz",
            lzma.compress(GERMAN.encode().replace(b"md5: ", b"md5: x")),
            "share no Description-md5",
        ),
    ],
)
def test_an_index_that_is_none_is_refused(indices, tmp_path, capsys, name, content, message):
    (indices / name).write_bytes(content)
    line = refusal(capsys, "debian", "--from", indices, "--out", tmp_path / "data")
    assert re.search(message, line), line
