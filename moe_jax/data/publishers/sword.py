"""The Bible in two languages, from modules of the SWORD project, which pysword reads."""

import functools
import hashlib
import importlib
from collections.abc import Mapping
from typing import Any

from moe_jax import extras
from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Given, Source
from moe_jax.data.publishers.written import tsv
from moe_jax.errors import UserError

# King James Version, Reina-Valera 1909.
ENGLISH, SPANISH = "engKJV2006eb", "spaRV1909eb"
# Verses that newer editions leave out or have elsewhere, which the figures of docs/tasks.md lack.
DISPUTED = frozenset(
    (
        "Luke 17:36",
        "Acts 8:37",
        "Acts 15:34",
        "Acts 24:7",
        "Romans 16:25",
        "Romans 16:26",
        "Romans 16:27",
    )
)

# "Genesis 1:1" -> its text.
Verses = Mapping[str, str]


def convert(given: Given) -> Converted:
    """Returns the verses that both have, in the order of the English one."""
    modules = _modules(given)
    texts: list[Verses] = []
    for name in (ENGLISH, SPANISH):
        bible, version = modules[name]
        texts.append(_verses(bible))
        joined = "\n".join(texts[-1].values()).encode("utf-8")
        digest = hashlib.sha256(joined).hexdigest()
        # pysword reads files of a module by itself, so the digest is of its verses.
        given.sources.append(
            Source(f"verses of SWORD module {name} {version}", len(joined), digest, "")
        )
    rows = aligned(*texts)
    if not rows:
        raise UserError(f"--from {given}: {ENGLISH} and {SPANISH} share no verse")
    files = {"translation/bible_kjv_rv1909_en_es.tsv.gz": tsv(rows)}
    return Converted(files, (f"{len(rows):,} verses",))


def aligned(english: Verses, spanish: Verses) -> list[tuple[str, str, str]]:
    """Returns (verse, English, Spanish), without pilcrows and without DISPUTED."""
    rows = []
    for verse, text in english.items():
        if verse in spanish and verse not in DISPUTED:
            rows.append((verse, _plain(text), _plain(spanish[verse])))
    return rows


def _plain(text: str) -> str:
    """Returns a verse without pilcrows."""
    return text.replace("¶", "").strip()


def _modules(given: Given) -> dict[str, tuple[Any, str]]:
    """Returns (Bible, version) of both modules, from folders with mods.d or from zip files."""
    extras.require("bible_en_es", "pysword")
    reader = importlib.import_module("pysword.modules")
    wanted = {ENGLISH, SPANISH}
    bibles: dict[str, tuple[Any, str]] = {}
    for path in given.paths:
        try:
            modules = reader.SwordModules(str(path))
            facts = modules.parse_modules()
            for name in facts.keys() & wanted:
                bible = modules.get_bible_from_module(name)
                bibles[name] = (bible, facts[name].get("version", ""))
        # pysword has no errors of its own, so a wrong file may raise any.
        except Exception as error:
            raise UserError(f"--from {path} cannot be read as SWORD modules: {error}") from None
    missing = sorted(wanted - bibles.keys())
    if missing:
        raise UserError(
            f"--from {given} has no SWORD module {' and '.join(missing)}: give the folder that "
            "holds mods.d and modules"
        )
    return bibles


def _verses(bible: Any) -> dict[str, str]:
    """Returns the verses that are not empty, by reference."""
    # pysword unpacks a whole book for each verse, so the last book is kept unpacked.
    if hasattr(bible, "_decompressed_text"):
        bible._decompressed_text = functools.lru_cache(1)(bible._decompressed_text)
    verses: dict[str, str] = {}
    for books in bible.get_structure().get_books().values():
        for book in books:
            for chapter, length in enumerate(book.chapter_lengths, 1):
                for verse in range(1, length + 1):
                    text = bible.get(books=book.name, chapters=chapter, verses=verse)
                    words = text.split()
                    if words:
                        verses[f"{book.name} {chapter}:{verse}"] = " ".join(words)
    return verses
