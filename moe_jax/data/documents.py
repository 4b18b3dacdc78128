"""The document that every source yields, and how a long text is cut into documents."""

import itertools
from typing import NamedTuple


class Document(NamedTuple):
    """One text that stands alone.

    Attention never crosses its ends, and it is held out as a whole or not at all.
    """

    text: str
    domain: str

    @property
    def pieces(self) -> list[str]:
        """Returns the texts that are encoded by themselves."""
        return [self.text]

    @property
    def learned(self) -> tuple[bool, ...] | None:
        """Returns which pieces are learned; None = the whole."""
        return None


class Conversation(NamedTuple):
    """A document of which some pieces alone are learned: the answers of a chat.

    Each piece is encoded by itself, as a prompt is when the model has read it and writes.
    """

    text: str
    domain: str
    # Where the text is cut.
    cuts: tuple[int, ...]
    # Of each piece, one more than cuts.
    learned: tuple[bool, ...]

    @property
    def pieces(self) -> list[str]:
        """Returns the texts that are encoded by themselves."""
        bounds = [0, *self.cuts, len(self.text)]
        return [self.text[start:end] for start, end in itertools.pairwise(bounds)]


AnyDocument = Document | Conversation


def cut(text: str, size: int) -> list[str]:
    """Cuts `text` into near-equal pieces of about `size` characters, which concatenate to it.

    Of each cut between equal pieces the last blank line within half a piece before it is taken,
    else the last end of a line, else the cut itself.
    """
    num_pieces = max(1, round(len(text) / size))
    # The cuts between equal pieces; each then moves back to a better place, if there is one.
    equal_cuts = [len(text) * i // num_pieces for i in range(1, num_pieces)]
    # A set: two cuts may move back to one place.
    cuts = {_cut_before(text, offset, size // 2) for offset in equal_cuts}
    bounds = [0, *sorted(cuts), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def _cut_before(text: str, offset: int, window: int) -> int:
    """Returns where to cut, at most `window` characters before `offset`."""
    for mark in ("\n\n", "\n"):
        start = text.rfind(mark, offset - window, offset)
        if start >= 0:
            return start + len(mark)
    return offset
