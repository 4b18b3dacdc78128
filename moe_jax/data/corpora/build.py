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

LONGEST = 32_000  # characters; a longer scene or chapter is cut into near-equal parts
STRETCH = 4_000  # characters of a document of continuous verse or prose
DICTIONARY_RUN = 200  # entries of a document of the dictionary
NUMBER = "[IVX]+|[0-9]+|FIRST|SECOND|THIRD|FOURTH|FIFTH"  # of an act or a scene

# The verse among the Milton files, each kept once: the same poems come again in other editions,
# which held out would be
# a test on training text. A part reaches from the first line (at or after the end of the last part)
# to the second.
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

SPANISH_BOOKS = (
    "Génesis Éxodo Levítico Números Deuteronomio Josué Jueces Rut 1_Samuel 2_Samuel 1_Reyes "
    "2_Reyes 1_Crónicas "
    "2_Crónicas Esdras Nehemías Ester Job Salmos Proverbios Eclesiastés Cantares Isaías Jeremías "
    "Lamentaciones "
    "Ezequiel Daniel Oseas Joel Amós Abdías Jonás Miqueas Nahum Habacuc Sofonías Hageo Zacarías "
    "Malaquías Mateo "
    "Marcos Lucas Juan Hechos Romanos 1_Corintios 2_Corintios Gálatas Efesios Filipenses "
    "Colosenses 1_Tesalonicenses "
    "2_Tesalonicenses 1_Timoteo 2_Timoteo Tito Filemón Hebreos Santiago 1_Pedro 2_Pedro 1_Juan "
    "2_Juan 3_Juan "
    "Judas Apocalipsis"
)


def tidy(text: str) -> str:
    """No white space at the ends of lines, never two blank lines in a row, one newline at the end."""
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def split_before(text: str, heading: str, shortest: int) -> list[str]:
    """Splits before each line that matches `heading`; a part below `shortest` characters joins the
    next one.
    """
    starts = [m.start() for m in re.finditer(heading, text, flags=re.MULTILINE)]
    parts: list[str] = []
    begin = 0
    for end in [*starts, len(text)]:
        if end - begin >= shortest or end == len(text):
            parts.append(text[begin:end])
            begin = end
    if len(parts) > 1 and len(parts[-1]) < shortest:
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def drama(text: str) -> Iterator[str]:
    """A scene is a document, the cast list another; the poems, which have no scenes, are cut into
    stretches.
    """
    works = split_before(text, r"^[^\n]+\n\nby William Shakespeare$", shortest=1)
    for work in filter(str.strip, works):
        scenes = split_before(
            work,
            r"^ ?(ACT|Act|SCENE|Scene)[ .]+([IVX]+|[0-9]+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b",
            600,
        )
        for scene in scenes:
            yield from cut(scene, STRETCH) if len(scenes) == 1 else cut_long(scene)


def verse(text: str) -> Iterator[str]:
    """Stretches of 4,000 characters of one part; printed line numbers and mail quoting are removed."""
    text = re.sub(r" {2,}[0-9]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^>From", "From", text, flags=re.MULTILINE).replace("............", "   ")
    lines = [line.strip().lstrip("ï»¿") for line in text.split("\n")]
    whole = text.split("\n")
    at = 0
    for first, last in MILTON_PARTS:
        begin = lines.index(first, at)
        at = lines.index(last, begin + 1)
        yield from cut(tidy("\n".join(whole[begin:at])), STRETCH)


def novel(text: str) -> Iterator[str]:
    """A chapter is a document; the first of a volume or a book has its title."""
    title = (
        r"EMMA|Persuasion|PRIDE AND PREJUDICE|SENSE AND SENSIBILITY|MANSFIELD PARK|NORTHANGER ABBEY"
    )
    for part in split_before(text, rf"^(({title})$|VOLUME |(CHAPTER|Chapter) [0-9IVXL]+)", 600):
        yield from cut_long(part)


def scripture(text: str, books: dict[str, str]) -> Iterator[str]:
    """A chapter is a document: its name, then one verse a line without the reference."""
    verses = (line.split("\t") for line in text.splitlines())
    for (book, chapter), group in itertools.groupby(verses, lambda verse: chapter_of(verse[0])):
        yield from cut_long(
            f"{books.get(book, book)} {chapter}\n" + "".join(f"{verse}\n" for _, verse in group)
        )


def chapter_of(reference: str) -> tuple[str, str]:
    book, _, place = reference.rpartition(" ")
    return book, place.split(":")[0]


def dictionary(text: str) -> Iterator[str]:
    """Runs of 200 entries in WordNet's order, which keeps what is alike together: a line is `words:
    gloss`.
    """
    rows = (line.split("\t")[1:] for line in text.splitlines()[1:])
    entries = (f"{words}: {re.sub(r'(?<=[^ ])_(?=[^ ])', ' ', gloss)}\n" for words, gloss in rows)
    while run := list(itertools.islice(entries, DICTIONARY_RUN)):
        yield "".join(run)


def cut_long(text: str) -> list[str]:
    return cut(text, LONGEST * 2 // 3) if len(text) > LONGEST else [text]


def english(text: str) -> Iterator[str]:
    return scripture(text, {"Revelation of John": "Revelation"})


def spanish(text: str) -> Iterator[str]:
    names = dict.fromkeys(line.split("\t")[0].rpartition(" ")[0] for line in text.splitlines())
    return scripture(
        text,
        dict(zip(names, (name.replace("_", " ") for name in SPANISH_BOOKS.split()), strict=True)),
    )


CORPORA = {
    "drama": ("shakespeare.txt", drama),
    "verse": ("milton.txt", verse),
    "novel": ("austen.txt", novel),
    "scripture_en": ("bible_kjv.txt", english),
    "scripture_es": ("bible_sparv.txt", spanish),
    "dictionary": ("wordnet30_supersense.tsv", dictionary),
}


def read(folder: pathlib.Path, name: str) -> str:
    """The text of `name` or `name`.gz, wherever it is in `folder`."""
    found = sorted([*folder.rglob(name), *folder.rglob(name + ".gz")])
    if not found:
        raise UserError(
            f"--from {folder} holds neither {name} nor {name}.gz; NOTICE.md says where to get it"
        )
    data = found[0].read_bytes()
    return (gzip.decompress(data) if found[0].suffix == ".gz" else data).decode("utf-8")


def build(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes out/<domain>.txt.xz for every corpus, the same bytes for the same sources."""
    for domain, (name, split) in CORPORA.items():
        documents = [tidy(text) for text in split(read(folder, name))]
        joined = "\f".join(documents).encode("utf-8")
        packed = lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)
        (out / f"{domain}.txt.xz").write_bytes(packed)
        sizes = sorted(len(text.encode("utf-8")) for text in documents)
        quantiles = [sizes[min(len(sizes) - 1, len(sizes) * q // 4)] for q in range(5)]
        print(
            f"{domain:13} {len(documents):5} documents {len(joined):9} bytes {len(packed):8} "
            f"packed; sizes {quantiles}"
        )


def main(argv: list[str]) -> int:
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
