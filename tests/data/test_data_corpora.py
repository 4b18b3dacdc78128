"""The embedded text: sizes of documents, nothing twice, and the rules by which it was split."""

import pathlib
import re

import pytest

from moe_jax.data import corpora
from moe_jax.data.corpora import build
from moe_jax.data.documents import cut
from moe_jax.errors import UserError

DOCUMENTS = {
    "drama": 804,
    "verse": 192,
    "novel": 274,
    "scripture_en": 1189,
    "scripture_es": 1189,
    "dictionary": 589,
}


@pytest.fixture(scope="module")
def texts():
    return {
        domain: [document.text for document in corpora.documents(domain)]
        for domain in corpora.DOMAINS
    }


def test_every_domain_has_documents_of_sane_size(texts):
    assert {domain: len(all_) for domain, all_ in texts.items()} == DOCUMENTS
    for all_ in texts.values():
        sizes = [len(text.encode()) for text in all_]
        assert 150 < min(sizes) and max(sizes) < 40_000
        assert len(set(all_)) == len(all_), (
            "a document that comes twice may be held out and trained on"
        )
        assert not any(mark in text for text in all_ for mark in "\f\t\r\ufeff")
        assert all(text.endswith("\n") and not text.startswith("\n") for text in all_)
    assert 29e6 < sum(len(text.encode()) for all_ in texts.values() for text in all_) < 30e6


def test_the_counts_in_the_documentation_are_those_of_the_files(texts):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for domain, all_ in texts.items():
        numbers = [len(all_), sum(len(text.encode()) for text in all_)]
        line = next(line for line in page.splitlines() if line.startswith(f"| `{domain}` |"))
        assert [f"{number:,}" for number in numbers] == re.findall(r"\| ([\d,]+) ", line)[:2], line


def test_verse_has_each_poem_once(texts):
    words = re.findall(r"[a-z']+", "\n".join(texts["verse"]).lower())
    phrases = [tuple(words[i : i + 8]) for i in range(len(words) - 8)]
    assert len(set(phrases)) > 0.99 * len(
        phrases
    )  # with the other editions of the source it is 0.94


def test_documents_begin_where_they_should(texts):
    assert texts["scripture_en"][0].startswith(
        "Genesis 1\nIn the beginning God created the heaven and the earth.\n"
    )
    assert texts["scripture_es"][-1].startswith("Apocalipsis 22\n")
    assert not re.search(r"^\d+:\d+", "\n".join(texts["scripture_en"]), re.MULTILINE)
    assert texts["dictionary"][0].startswith("entity: that which is perceived or known")
    assert all(text.count("\n") <= 200 for text in texts["dictionary"])
    assert sum(text.startswith(("SCENE", "Scene", "ACT", "Act")) for text in texts["drama"]) > 600
    chapters = [
        re.match(r"(CHAPTER|Chapter|VOLUME|[A-Z]{4}|Persuasion)", text) for text in texts["novel"]
    ]
    assert chapters.count(None) == 4  # the second halves of chapters of more than 32,000 characters


def test_max_bytes_gives_whole_documents_within_the_bound():
    some = list(corpora.documents("novel", max_bytes=50_000))
    assert some == list(corpora.documents("novel"))[: len(some)]
    assert 20_000 < sum(len(document.text.encode()) for document in some) <= 50_000


def test_unknown_domain_is_named():
    with pytest.raises(UserError, match="no embedded domain 'opera'; there are drama, verse"):
        next(corpora.documents("opera"))


@pytest.mark.parametrize(
    "text", ["", "a", "ab\n" * 10_000, "x" * 50_000, ("line\n" * 30 + "\n") * 300]
)
def test_cut_keeps_the_text_and_cuts_near_the_size(text):
    pieces = cut(text, 4_000)
    assert "".join(pieces) == text
    if len(text) > 8_000:
        assert all(pieces) and 2_000 <= min(map(len, pieces)) and max(map(len, pieces)) <= 6_000
    if "\n\n" in text:
        assert all(piece.endswith("\n\n") for piece in pieces)


def test_scenes_of_a_play_and_stretches_of_a_poem():
    speech = "ROMEO.\nAy me.\n\n" * 60
    play = f"A PLAY\n\nby William Shakespeare\n\nROMEO, a youth.\n{'x' * 600}\n\n"
    play += f"ACT I.\n\nSCENE I. A street.\n\n{speech}SCENE II. A wood.\n\n{speech}"
    play += f"SCENE III.\n\n[Exit.]\n\nACT II. SCENE I.\n\n{speech}"
    poem = "A POEM\n\nby William Shakespeare\n\n" + "O love, whose act is but a scene.\n" * 300
    documents = list(build.drama(play + "\n\n" + poem))
    assert "".join(documents) == play + "\n\n" + poem
    heads = [document.strip().splitlines()[0] for document in documents]
    assert heads[:4] == [
        "A PLAY",
        "ACT I.",
        "SCENE II. A wood.",
        "SCENE III.",
    ]  # too short alone: the next joins it
    assert heads[4] == "A POEM" and len(documents) == 4 + round(len(poem) / build.STRETCH)


def test_verse_takes_the_named_parts_and_drops_line_numbers():
    firsts = [first for first, _ in build.MILTON_PARTS]
    lines = ["PROSE"]
    for first, last in build.MILTON_PARTS:
        lines += [first, "Sing Muse          10", ">From"] + (
            [last, "NOTES"] if last not in firsts else []
        )
    joined = "".join(build.verse("\n".join(lines)))
    assert joined.count("Sing Muse\nFrom\n") == len(build.MILTON_PARTS)
    assert "NOTES" not in joined and "PROSE" not in joined


def test_chapters_verses_and_entries():
    chapters = build.novel("EMMA\n\nCHAPTER I\n" + "a\n" * 400 + "CHAPTER II\n" + "b\n" * 400)
    assert [chapter[:9] for chapter in chapters] == ["EMMA\n\nCHA", "CHAPTER I"]
    bible = "I Kings 1:1\tA.\nI Kings 1:2\tB.\nI Kings 2:1\tC.\n"
    assert list(build.scripture(bible, {"I Kings": "1 Reyes"})) == [
        "1 Reyes 1\nA.\nB.\n",
        "1 Reyes 2\nC.\n",
    ]
    rows = "class\twords\tgloss\n" + "n\tcat, true cat\ta feline_mammal\n" * 201
    assert [len(d.splitlines()) for d in build.dictionary(rows)] == [200, 1]
    assert next(build.dictionary(rows)).startswith("cat, true cat: a feline mammal\n")
    assert build.tidy("\n a \t\n\n\n\nb\n\n") == " a\n\nb\n"


def test_building_without_the_sources_says_where_they_are(tmp_path):
    with pytest.raises(
        UserError, match=r"holds neither shakespeare\.txt nor shakespeare\.txt\.gz; NOTICE"
    ):
        build.main(["--from", str(tmp_path)])
