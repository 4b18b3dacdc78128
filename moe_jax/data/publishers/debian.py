"""Debian's indices: Packages, Translation-XX, and the Release file with their sha256 sums.

An index is a list of paragraphs of `Field: value` (deb-control(5)). A description begins with its
short form; a line with a dot alone divides the paragraphs of the long one.
"""

import functools
import re
from collections.abc import Callable, Iterator

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Given, GivenFile
from moe_jax.data.publishers.written import tsv
from moe_jax.errors import UserError

RELEASE = "Release|InRelease|*_Release|*_InRelease"
# Debian 12, the release of the figures in docs/tasks.md.
MEASURED = "bookworm"
# Characters of a paragraph, below which a pair is taken.
LONGEST = 500

Paragraph = dict[str, str]


def sections(given: Given) -> Converted:
    """Returns section, package and description, by package; of equal descriptions the first."""
    packages, notes = _packages(given)
    english = _descriptions(given, "en")
    # By description.
    rows: dict[str, tuple[str, str, str]] = {}
    for name, package in packages.items():
        described = english.get(package.get("Description-md5", ""))
        if described is not None:
            text = " ".join(_lines(described))
            # Packages of one source often share their text.
            rows.setdefault(text, (package.get("Section", ""), name, text))
    if not rows:
        raise UserError(
            f"--from {given}: Packages and Translation-en share no Description-md5: give one "
            "release"
        )
    lines = tsv([("section", "package", "description"), *rows.values()])
    files = {"classification/debian12_descriptions_by_section.tsv.gz": lines}
    return Converted(files, (f"{len(rows):,} descriptions", *notes))


def depends(given: Given) -> Converted:
    """Returns each package with what it depends on, by name; of alternatives the first."""
    packages, notes = _packages(given)
    rows: list[tuple[str, str]] = []
    for name, package in packages.items():
        dependencies = _dependencies(package.get("Depends", ""))
        if dependencies:
            rows.append((name, " ".join(dependencies)))
    files = {"recommendation/debian12_depends.tsv.gz": tsv([("package", "depends"), *rows])}
    return Converted(files, (f"{len(rows):,} packages", *notes))


def translation(language: str) -> Callable[[Given], Converted]:
    """Returns the converter of the pairs of English and a language."""
    return functools.partial(_pairs, language=language)


def _pairs(given: Given, language: str) -> Converted:
    """Returns the paragraphs of descriptions that have as many in both languages, sorted.

    Left out are paragraphs that are the same in both languages, have a tab, or are not shorter than
    LONGEST.
    """
    english = _descriptions(given, "en")
    pairs: set[tuple[str, str]] = set()
    for md5, described in _descriptions(given, language).items():
        # Translations are found by the md5 sum of the English description.
        if md5 not in english:
            continue
        sources = _paragraphs(english[md5])
        targets = _paragraphs(described)
        # With another number of paragraphs nobody knows which belong together.
        if len(sources) == len(targets):
            pairs.update(zip(sources, targets))
    kept = sorted(pair for pair in pairs if _is_prose(*pair))
    if not kept:
        raise UserError(
            f"--from {given}: Translation-en and Translation-{language} share no Description-md5"
        )
    notes = (f"{len(kept):,} pairs of paragraphs", *_release_notes(given))
    return Converted({f"translation/ddtp_en_{language}.tsv.gz": tsv(kept)}, notes)


def _is_prose(source: str, target: str) -> bool:
    """Returns whether a pair is text that was translated, and short enough."""
    short = max(len(source), len(target)) < LONGEST
    return short and source != target and "\t" not in source + target


def _packages(given: Given) -> tuple[dict[str, Paragraph], tuple[str, ...]]:
    """Returns the packages by name, sorted, and the notes on their release."""
    index = _index(given, "Packages|*_Packages")
    wanted = ("Package", "Section", "Depends", "Description-md5")
    packages = {paragraph["Package"]: paragraph for paragraph in _read(index, wanted, "Package")}
    return dict(sorted(packages.items())), _release_notes(given)


def _descriptions(given: Given, language: str) -> dict[str, str]:
    """Returns the descriptions in a language by the md5 sum of the English one."""
    index = _index(given, f"Translation-{language}|*_Translation-{language}")
    field = f"Description-{language}"
    wanted = ("Description-md5", field)
    by_md5: dict[str, str] = {}
    for paragraph in _read(index, wanted, "Description-md5"):
        # The first of several: versions of a package may share a description.
        by_md5.setdefault(paragraph["Description-md5"], paragraph.get(field, ""))
    return by_md5


def _index(given: Given, patterns: str) -> GivenFile:
    """Returns an index, compared with the sums of the release if its Release file is given too."""
    sums = _sums(given.one(RELEASE)) if given.has(RELEASE) else ()
    return given.one(patterns, sums)


def _sums(release: GivenFile) -> list[str]:
    """Returns all sha256 sums of a Release file."""
    sums = re.findall(r"^ ([0-9a-f]{64}) +\d+ \S+$", release.text(), flags=re.MULTILINE)
    if not sums:
        raise UserError(f"{release.path} has no sha256 sums: give Debian's InRelease, or none")
    return sums


def _release_notes(given: Given) -> tuple[str, ...]:
    """Returns which release the indices are of, and what follows for the figures."""
    if not given.has(RELEASE):
        return (
            "nothing was compared with Debian's sums: give the InRelease of dists/bookworm too",
        )
    text = given.one(RELEASE).text()
    codename = re.search(r"^Codename: (\S+)$", text, re.MULTILINE)
    version = re.search(r"^Version: (\S+)$", text, re.MULTILINE)
    release = f"Debian {version[1] if version else ''} ({codename[1] if codename else 'unknown'})"
    if codename and codename[1] == MEASURED:
        note = "figures of docs/tasks.md differ a little from one point release to the next"
    else:
        note = f"the figures of docs/tasks.md are of {MEASURED}: yours will differ"
    return (f"{release}; {note}",)


def _read(index: GivenFile, wanted: tuple[str, ...], key: str) -> Iterator[Paragraph]:
    """Yields the paragraphs with their wanted fields.

    Raises UserError if one has no `key`, or the file ends within one.
    """
    text = index.text()
    # Every paragraph ends with an empty line, so a file that was cut shows here.
    if not text.endswith("\n\n"):
        raise UserError(
            f"{index.path} does not end with an empty line: it was cut, or is no index of Debian"
        )
    for number, block in enumerate(text.split("\n\n"), 1):
        paragraph: Paragraph = {}
        # A line that begins with white space goes on with the field above.
        for field in re.split(r"\n(?=\S)", block.strip("\n")):
            name, _, value = field.partition(":")
            if name in wanted:
                paragraph[name] = value.strip(" ")
        if key in paragraph:
            yield paragraph
        elif block.strip():
            raise UserError(
                f"{index.path}, paragraph {number} has no field {key}: give Debian's own index"
            )


def _lines(description: str) -> list[str]:
    """Returns the lines of a description without the dots that divide its paragraphs."""
    return [line.strip() for line in description.split("\n") if line.strip() != "."]


def _paragraphs(description: str) -> list[str]:
    """Returns the short form, and the paragraphs of the long one, each as one line."""
    short, *rest = description.split("\n")
    joined: list[list[str]] = [[]]
    for line in rest:
        if line.strip() == ".":
            # A dot alone begins the next paragraph.
            joined.append([])
        else:
            joined[-1].append(line.strip())
    return [short.strip(), *(" ".join(lines) for lines in joined if lines)]


def _dependencies(depends: str) -> list[str]:
    """Returns the names of a Depends field, sorted: "a (>= 1) | b, c:any" -> ["a", "c"]."""
    names: set[str] = set()
    for alternatives in depends.split(","):
        first, _, _ = alternatives.partition("|")
        # Behind the name may be a version "(>= 1)", or an architecture ":any".
        name = re.split(r"[\s(:]", first.strip())[0]
        if name:
            names.add(name)
    return sorted(names)
