"""The embedded text: six domains, 29 MB, shipped compressed.

So the first run needs no network. docs/data.md says what a document is in each domain, NOTICE.md
where the text comes from and its licences; build.py makes the files.
"""

import importlib.resources
import lzma
from collections.abc import Iterator

from moe_jax.data.documents import Document
from moe_jax.errors import UserError

DOMAINS = ("drama", "verse", "novel", "scripture_en", "scripture_es", "dictionary")


def documents(domain: str, max_bytes: int | None = None) -> Iterator[Document]:
    """Yields the documents of an embedded domain in their order.

    With `max_bytes` it yields as many whole ones as fit into so many bytes of UTF-8. Raises
    UserError for an unknown domain.
    """
    if domain not in DOMAINS:
        raise UserError(f"no embedded domain {domain!r}; there are {', '.join(DOMAINS)}")
    packed = importlib.resources.files(__name__).joinpath(f"{domain}.txt.xz").read_bytes()
    size = 0
    # build.py puts a form feed between documents.
    for data in lzma.decompress(packed).split(b"\f"):
        size += len(data)
        if max_bytes is not None and size > max_bytes:
            return
        yield Document(data.decode("utf-8"), domain)
