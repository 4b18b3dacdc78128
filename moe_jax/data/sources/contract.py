"""What a kind of source is: how a spec names it, and how its documents are read.

A spec is `[LABEL=]KIND[:ARGUMENT]`. `KIND` is the key of `SOURCES`; the rest of the grammar, the
label and the documents without text are dealt with in `__init__.py`, once for all kinds.

What a user can mend is a UserError of one line: it names the file (or the dataset) and the line,
row or record in it, says what is wrong, and ends with the way out.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from moe_jax.data.documents import AnyDocument


class Source(NamedTuple):
    """Holds all that there is to know of a kind of source; `SOURCE` of its file."""

    # What follows KIND in a spec, as it is shown to users: ":GLOB[#FIELD]".
    argument_syntax: str
    # Without an argument the spec is refused.
    needs_argument: bool
    # A run reads it and packs it, as bytes, when it starts. Any other kind is prepared first.
    packed_by_run: bool
    # Argument ("" if there is none) -> the documents, each with the domain that it has where the
    # spec has no label. They come in the same order each time: a source is read three or four
    # times, and the passes must agree.
    read: Callable[[str], Iterator[AnyDocument]]
    # Modules that `read` imports and that only an extra installs: keys of extras.DISTRIBUTIONS.
    extra_modules: tuple[str, ...] = ()
