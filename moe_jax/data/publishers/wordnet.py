"""WordNet's database files (wndb(5WN)): glosses with the lexicographer's file of each synset.

A line of data.POS is a synset. It begins with its own place in the file, in bytes, so that a
changed or truncated file is recognised. W_CNT, the number of words, is hexadecimal:

    OFFSET LEX_FILENUM SS_TYPE W_CNT [WORD LEX_ID]... P_CNT [POINTER OFFSET POS SOURCE]... | GLOSS
"""

from collections.abc import Iterator

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Found, Given
from moe_jax.data.publishers.written import table
from moe_jax.errors import UserError

# lexnames(5WN): the number of a lexicographer's file is its place here.
LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute "
    "noun.body noun.cognition noun.communication noun.event noun.feeling noun.food noun.group "
    "noun.location noun.motive noun.object noun.person noun.phenomenon noun.plant "
    "noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication "
    "verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion "
    "verb.perception verb.possession verb.social verb.stative verb.weather adj.ppl"
).split()
PARTS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
MEASURED = "WordNet 3.0"  # the edition of the figures in docs/tasks.md

Row = tuple[str, str, str]  # supersense, words, gloss


def convert(given: Given) -> Converted:
    """Returns all synsets, nouns first, in the order of the files."""
    rows: list[Row] = [("supersense", "words", "gloss")]
    editions: set[str] = set()
    for part, letter in PARTS.items():
        found = given.one(f"data.{part}")
        editions.add(_edition(found))
        rows.extend(_synsets(found, letter))
        if given.has(f"index.{part}"):
            _check_end(found, _last(given.one(f"index.{part}")))
    notes = [f"{len(rows) - 1:,} synsets of {' and '.join(sorted(editions))}"]
    if editions != {MEASURED}:
        notes.append(f"the figures of docs/tasks.md are of {MEASURED}: yours will differ")
    return Converted({"classification/wordnet30_supersense.tsv.gz": table(rows)}, tuple(notes))


def _edition(found: Found) -> str:
    """Returns "WordNet 3.0", from the licence at the head of a file."""
    head = found.data[:4000].decode("utf-8", "replace")
    for edition in ("WordNet 3.0", "WordNet 3.1"):
        if f"{edition} Copyright" in head:
            return edition
    raise UserError(
        f"{found.place} does not begin with the licence of WordNet 3.0 or 3.1: give the data.* of "
        "dict/"
    )


def _synsets(found: Found, letter: str) -> Iterator[Row]:
    found.text()  # refuses what is not UTF-8, before any line is read
    if not found.data.endswith(b"\n"):
        raise UserError(f"{found.place} ends within a line: the file was cut")
    place, last, some = 0, 0, False
    for number, line in enumerate(found.data.split(b"\n"), 1):
        if line and not line.startswith(b"  "):  # such lines are the licence
            try:
                row, pointed = _synset(line.decode("utf-8"), place, letter)
            except (ValueError, IndexError):
                message = f"{found.place}, line {number} is no synset at byte {place}: the file was changed or cut"
                raise UserError(f"{message}; take it from its publisher again") from None
            last, some = max(last, pointed), True
            yield row
        place += len(line) + 1
    if not some:
        raise UserError(f"{found.place} has no synset: the file was cut")
    _check_end(found, last)


def _check_end(found: Found, last: int) -> None:
    """UserError if a file ends before byte `last`, at which a synset begins."""
    if last >= len(found.data):
        size = len(found.data)
        raise UserError(
            f"{found.place} ends at byte {size}, but has a synset at byte {last}: the file was cut"
        )


def _last(index: Found) -> int:
    """Returns the last place of a synset in an index file, whose lines end with places."""
    last = 0
    for line in index.text().splitlines():
        if not line.startswith("  "):
            try:
                fields = line.split()
                last = max(last, *map(int, fields[-int(fields[2]) :]))
            except (ValueError, IndexError):
                raise UserError(
                    f"{index.place} is no index file of WordNet: leave it out, or give the "
                    "publisher's"
                ) from None
    return last


def _synset(line: str, place: int, letter: str) -> tuple[Row, int]:
    """Returns the row of a line, and the farthest byte of the same file that it points to.

    ValueError or IndexError for a line that is no synset, or not the one of this place.
    """
    head, gloss = line.split(" | ", 1)
    fields = head.split(" ")
    if int(fields[0]) != place:
        raise ValueError(fields[0])
    words_end = 4 + 2 * int(fields[3], 16)
    words = [word.replace("_", " ") for word in fields[4:words_end:2]]
    pointers = fields[words_end + 1 : words_end + 1 + 4 * int(fields[words_end])]
    own = [int(place) for place, part in zip(pointers[1::4], pointers[2::4]) if part == letter]
    return (LEXNAMES[int(fields[1])], ", ".join(words), gloss.strip()), max(own, default=0)
