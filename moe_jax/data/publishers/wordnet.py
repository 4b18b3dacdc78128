"""WordNet's database files (wndb(5WN)): glosses with the lexicographer's file of each synset.

A line of data.POS is a synset. It begins with its own offset in the file, in bytes, so that a
changed or truncated file is recognised. W_CNT, the number of words, is hexadecimal:

    OFFSET LEX_FILENUM SS_TYPE W_CNT [WORD LEX_ID]... P_CNT [POINTER OFFSET POS SOURCE]... | GLOSS
"""

from collections.abc import Iterator

from moe_jax.data.publishers.contract import Converted
from moe_jax.data.publishers.given import Given, GivenFile
from moe_jax.data.publishers.written import tsv
from moe_jax.errors import UserError

# lexnames(5WN): the number of a lexicographer's file is its index here.
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
# The edition of the figures in docs/tasks.md.
MEASURED = "WordNet 3.0"

# Supersense, words, gloss.
Row = tuple[str, str, str]


def convert(given: Given) -> Converted:
    """Returns all synsets, nouns first, in the order of the files."""
    rows: list[Row] = [("supersense", "words", "gloss")]
    editions: set[str] = set()
    for part, letter in PARTS.items():
        file = given.one(f"data.{part}")
        editions.add(_edition(file))
        rows.extend(_synsets(file, letter))
        # The index shows that a data file was cut between two synsets.
        if given.has(f"index.{part}"):
            _check_end(file, _last_offset(given.one(f"index.{part}")))
    notes = [f"{len(rows) - 1:,} synsets of {' and '.join(sorted(editions))}"]
    if editions != {MEASURED}:
        notes.append(f"the figures of docs/tasks.md are of {MEASURED}: yours will differ")
    return Converted({"classification/wordnet30_supersense.tsv.gz": tsv(rows)}, tuple(notes))


def _edition(file: GivenFile) -> str:
    """Returns "WordNet 3.0", from the licence at the head of a file."""
    head = file.data[:4000].decode("utf-8", "replace")
    for edition in ("WordNet 3.0", "WordNet 3.1"):
        if f"{edition} Copyright" in head:
            return edition
    raise UserError(
        f"{file.path} does not begin with the licence of WordNet 3.0 or 3.1: give the data.* of "
        "dict/"
    )


def _synsets(file: GivenFile, letter: str) -> Iterator[Row]:
    """Yields the synsets of a data file. Raises UserError if it was changed or cut.

    `letter` is the part of speech by which a pointer names a synset of the same file.
    """
    # Refuses what is not UTF-8, before any line is read.
    file.text()
    if not file.data.endswith(b"\n"):
        raise UserError(f"{file.path} ends within a line: the file was cut")
    # Of the line, in bytes.
    offset = 0
    # A pointer behind the end shows that the file was cut between two synsets.
    last_pointer = 0
    empty = True
    for number, line in enumerate(file.data.split(b"\n"), 1):
        # Lines that begin with two spaces are the licence.
        if line and not line.startswith(b"  "):
            try:
                row, pointer = _synset(line.decode("utf-8"), offset, letter)
            except (ValueError, IndexError):
                raise UserError(
                    f"{file.path}, line {number} is no synset at byte {offset}: the file was "
                    "changed or cut; take it from its publisher again"
                ) from None
            last_pointer = max(last_pointer, pointer)
            empty = False
            yield row
        offset += len(line) + 1
    if empty:
        raise UserError(f"{file.path} has no synset: the file was cut")
    _check_end(file, last_pointer)


def _check_end(file: GivenFile, last: int) -> None:
    """Raises UserError if a file ends before byte `last`, at which a synset begins."""
    size = len(file.data)
    if last >= size:
        raise UserError(
            f"{file.path} ends at byte {size}, but has a synset at byte {last}: the file was cut"
        )


def _last_offset(index: GivenFile) -> int:
    """Returns the last offset of a synset in an index file.

    A line of it ends with the offsets of its synsets; their number is its third field.
    """
    last = 0
    for line in index.text().splitlines():
        if not line.startswith("  "):
            try:
                fields = line.split()
                offsets = [int(field) for field in fields[-int(fields[2]) :]]
                last = max(last, *offsets)
            except (ValueError, IndexError):
                raise UserError(
                    f"{index.path} is no index file of WordNet: leave it out, or give the "
                    "publisher's"
                ) from None
    return last


def _synset(line: str, offset: int, letter: str) -> tuple[Row, int]:
    """Returns the row of a line, and the farthest byte of the same file that it points to.

    ValueError or IndexError for a line that is no synset, or not the one of this offset.
    """
    head, gloss = line.split(" | ", 1)
    fields = head.split(" ")
    if int(fields[0]) != offset:
        raise ValueError(fields[0])
    # Two fields for each word, then the number of pointers, then four fields for each pointer.
    words_end = 4 + 2 * int(fields[3], 16)
    words = [word.replace("_", " ") for word in fields[4:words_end:2]]
    pointers_start = words_end + 1
    pointers = fields[pointers_start : pointers_start + 4 * int(fields[words_end])]
    # Offsets of other parts of speech are places in other files.
    targets = zip(pointers[1::4], pointers[2::4])
    own = [int(target) for target, part in targets if part == letter]
    row = (LEXNAMES[int(fields[1])], ", ".join(words), gloss.strip())
    return row, max(own, default=0)
