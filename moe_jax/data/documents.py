"""What every source yields: a document with its domain, and how a long text is cut into documents."""

from typing import NamedTuple


class Document(NamedTuple):
    """One text that stands alone: attention never crosses its ends, and it is held out as a whole
    or not at all.
    """

    text: str
    domain: str


def cut(text: str, size: int) -> list[str]:
    """Cuts `text` into near-equal pieces of about `size` characters (the pieces concatenate to the
    text).

    A cut falls after the last blank line within half a piece of its place, else after a line, else
    exactly there.
    """
    num_pieces = max(1, round(len(text) / size))
    ends = [_end_near(text, len(text) * i // num_pieces, size // 2) for i in range(1, num_pieces)]
    starts = [0, *sorted(set(ends))]
    return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)])]


def _end_near(text: str, place: int, window: int) -> int:
    for mark in ("\n\n", "\n"):
        found = text.rfind(mark, place - window, place)
        if found >= 0:
            return found + len(mark)
    return place
