"""The source `text`: files of plain text, one document each."""

from collections.abc import Iterator

from moe_jax.data.documents import Document, cut
from moe_jax.data.sources.characters import open_text, plain, readable
from moe_jax.data.sources.contract import Source
from moe_jax.data.sources.files import BLOCK, matches, stem

# Characters of a document of a long text file.
PIECE = 16_000


def read(pattern: str) -> Iterator[Document]:
    """Yields a file as one document, or as documents of about PIECE characters if it is long.

    Long is a file of more than two pieces. It is read and cut block by block.
    """
    for path in matches("text", pattern):
        domain = stem(path)
        with readable(path), open_text(path) as file:
            # What is read and not yet a document.
            rest = ""
            while block := file.read(BLOCK):
                rest += block
                if len(rest) > 2 * PIECE:
                    # The last piece may go on in the next block, so it waits for that.
                    *pieces, rest = cut(rest, PIECE)
                    for piece in pieces:
                        yield Document(plain(piece, path), domain)
            yield Document(plain(rest, path), domain)


SOURCE = Source(argument_syntax=":GLOB", needs_argument=True, packed_by_run=False, read=read)
