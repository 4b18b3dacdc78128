"""Makes the embedded corpora: `python -m moe_jax.data.corpora.build --from DIR`.

DIR holds the sources (NOTICE.md says where each comes from), plain or gzipped: shakespeare.txt,
milton.txt, austen.txt, bible_kjv.txt, bible_sparv.txt and wordnet30_supersense.tsv. Each corpus
becomes one `.txt.xz` beside this file, its documents separated by a form feed, and a line of its
statistics is printed.
"""

import argparse
import gzip
import itertools
import lzma
import pathlib
import re
import sys
from collections.abc import Iterator

from moe_jax.data.documents import cut
from moe_jax.errors import UserError

# Characters; a longer scene or chapter is cut into near-equal parts.
LONGEST = 32_000
# Characters of a document of continuous verse or prose.
STRETCH = 4_000
# Entries of a document of the dictionary.
DICTIONARY_RUN = 200
# Of an act or a scene.
NUMBER = "[IVX]+|[0-9]+|FIRST|SECOND|THIRD|FOURTH|FIFTH"

# The verse among the Milton files, each poem once. The same poems come again in other editions;
# held out, those would be a test on training text. A part reaches from its first line (at or after
# the end of the part before) to the line before its second.
MILTON_PARTS = (
    ("L'ALLEGRO", "PARADISE LOST"),
    ("PARADISE LOST", "PARADISE REGAINED"),
    ("PARADISE REGAINED", "POEMATA: LATIN, GREEK AND ITALIAN POEMS BY JOHN MILTON"),
    ("ON THE MORNING OF CHRISTS NATIVITY.", "L'ALLEGRO."),
    ("SONNETS.", "Transcriber's note: Facsimile of Title page of Lycidas follows:"),
    (
        "POEMS ADDED IN THE 1673 EDITION.",
        "COLLECTION OF PASSAGES TRANSLATED IN THE PROSE WRITINGS.",
    ),
    ("SAMSON AGONISTES", "APPENDIX."),
)

# The names of the books in the order of the Spanish file, which has them in English.
SPANISH_BOOKS = (
    "Génesis Éxodo Levítico Números Deuteronomio Josué Jueces Rut 1_Samuel 2_Samuel 1_Reyes "
    "2_Reyes 1_Crónicas 2_Crónicas Esdras Nehemías Ester Job Salmos Proverbios Eclesiastés "
    "Cantares Isaías Jeremías Lamentaciones Ezequiel Daniel Oseas Joel Amós Abdías Jonás Miqueas "
    "Nahum Habacuc Sofonías Hageo Zacarías Malaquías Mateo Marcos Lucas Juan Hechos Romanos "
    "1_Corintios 2_Corintios Gálatas Efesios Filipenses Colosenses 1_Tesalonicenses "
    "2_Tesalonicenses 1_Timoteo 2_Timoteo Tito Filemón Hebreos Santiago 1_Pedro 2_Pedro 1_Juan "
    "2_Juan 3_Juan Judas Apocalipsis"
)


def tidy(text: str) -> str:
    """Returns the text without white space at the ends of lines or several blank lines in a row.

    It ends in one newline.
    """
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def split_before(text: str, heading: str, shortest: int) -> list[str]:
    """Splits before each line that matches `heading`.

    A part below `shortest` characters joins the next one, the last such part the one before.
    """
    starts = [match.start() for match in re.finditer(heading, text, flags=re.MULTILINE)]
    parts: list[str] = []
    begin = 0
    # A part ends before a heading, but only once it is long enough.
    for end in [*starts, len(text)]:
        if end - begin >= shortest or end == len(text):
            parts.append(text[begin:end])
            begin = end
    if len(parts) > 1 and len(parts[-1]) < shortest:
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def drama(text: str) -> Iterator[str]:
    """Yields the scenes and the cast lists of plays; poems, which have no scenes, in stretches."""
    works = split_before(text, r"^[^\n]+\n\nby William Shakespeare$", shortest=1)
    for work in filter(str.strip, works):
        scenes = split_before(work, rf"^ ?(ACT|Act|SCENE|Scene)[ .]+({NUMBER})\b", 600)
        for scene in scenes:
            yield from cut(scene, STRETCH) if len(scenes) == 1 else cut_long(scene)


def verse(text: str) -> Iterator[str]:
    """Yields stretches of about STRETCH characters of each part of MILTON_PARTS.

    Printed line numbers and the quoting of mail are removed.
    """
    text = re.sub(r" {2,}[0-9]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^>From", "From", text, flags=re.MULTILINE).replace("............", "   ")
    lines = text.split("\n")
    # "ï»¿" is the mark of UTF-8 at the beginning of a file, read as Latin-1.
    headings = [line.strip().lstrip("ï»¿") for line in lines]
    end = 0
    for first, last in MILTON_PARTS:
        begin = headings.index(first, end)
        end = headings.index(last, begin + 1)
        yield from cut(tidy("\n".join(lines[begin:end])), STRETCH)


def novel(text: str) -> Iterator[str]:
    """Yields chapters; the first of a volume or a book has its title."""
    title = (
        r"EMMA|Persuasion|PRIDE AND PREJUDICE|SENSE AND SENSIBILITY|MANSFIELD PARK|NORTHANGER ABBEY"
    )
    for part in split_before(text, rf"^(({title})$|VOLUME |(CHAPTER|Chapter) [0-9IVXL]+)", 600):
        yield from cut_long(part)


def scripture(text: str, books: dict[str, str]) -> Iterator[str]:
    """Yields chapters: the name, then one verse a line without its reference.

    `books` has the names of books that are renamed.
    """
    verses = [line.split("\t") for line in text.splitlines()]
    for (book, chapter), group in itertools.groupby(verses, lambda verse: chapter_of(verse[0])):
        lines = [f"{books.get(book, book)} {chapter}\n"]
        lines += [f"{verse}\n" for _, verse in group]
        yield from cut_long("".join(lines))


def chapter_of(reference: str) -> tuple[str, str]:
    """Returns book and chapter of a verse: "1 Samuel 2:3" -> ("1 Samuel", "2")."""
    book, _, verse = reference.rpartition(" ")
    return book, verse.split(":")[0]


def dictionary(text: str) -> Iterator[str]:
    """Yields runs of DICTIONARY_RUN entries, a line `words: gloss` each.

    They keep the order of WordNet, in which related entries stand together.
    """
    entries: list[str] = []
    for line in text.splitlines()[1:]:
        _, words, gloss = line.split("\t")
        # The file has _ for some spaces within a gloss.
        spaced_gloss = re.sub(r"(?<=[^ ])_(?=[^ ])", " ", gloss)
        entries.append(f"{words}: {spaced_gloss}\n")
    for start in range(0, len(entries), DICTIONARY_RUN):
        yield "".join(entries[start : start + DICTIONARY_RUN])


def cut_long(text: str) -> list[str]:
    """Returns the text, or its near-equal parts if it has more than LONGEST characters."""
    return cut(text, LONGEST * 2 // 3) if len(text) > LONGEST else [text]


def english(text: str) -> Iterator[str]:
    """Yields the chapters of the King James Bible."""
    return scripture(text, {"Revelation of John": "Revelation"})


def spanish(text: str) -> Iterator[str]:
    """Yields the chapters of the Reina-Valera of 1909 with Spanish names of the books."""
    # A dict keeps the order in which the books first come.
    books = dict.fromkeys(chapter_of(line.split("\t")[0])[0] for line in text.splitlines())
    names = [name.replace("_", " ") for name in SPANISH_BOOKS.split()]
    return scripture(text, dict(zip(books, names, strict=True)))


CORPORA = {
    "drama": ("shakespeare.txt", drama),
    "verse": ("milton.txt", verse),
    "novel": ("austen.txt", novel),
    "scripture_en": ("bible_kjv.txt", english),
    "scripture_es": ("bible_sparv.txt", spanish),
    "dictionary": ("wordnet30_supersense.tsv", dictionary),
}


def read(folder: pathlib.Path, name: str) -> str:
    """Returns the text of `name` or `name`.gz, wherever it is in `folder`. Raises UserError if
    nowhere.
    """
    paths = sorted([*folder.rglob(name), *folder.rglob(name + ".gz")])
    if not paths:
        raise UserError(
            f"--from {folder} holds neither {name} nor {name}.gz; NOTICE.md says where to get it"
        )
    path = paths[0]
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return data.decode("utf-8")


def build(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes out/<domain>.txt.xz for every corpus, the same bytes for the same sources."""
    for domain, (name, split) in CORPORA.items():
        documents = [tidy(text) for text in split(read(folder, name))]
        joined = "\f".join(documents).encode("utf-8")
        # As small as it gets, however long it takes: the files come with the package.
        packed = lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)
        (out / f"{domain}.txt.xz").write_bytes(packed)
        sizes = sorted(len(text.encode("utf-8")) for text in documents)
        last = len(sizes) - 1
        quantiles = [sizes[min(last, len(sizes) * quarter // 4)] for quarter in range(5)]
        print(
            f"{domain:13} {len(documents):5} documents {len(joined):9} bytes {len(packed):8} "
            f"packed; sizes {quantiles}"
        )


def main(argv: list[str]) -> int:
    """Builds the corpora and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--from", dest="folder", type=pathlib.Path, required=True, help="where the source files are"
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent,
        help="default: beside build.py",
    )
    flags = parser.parse_args(argv)
    build(flags.folder, flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
