"""Where text comes from: `SOURCES[kind](argument, label)` yields documents.

A source is named by a spec: `[label=]kind[:argument]`, for example `embedded:drama,verse`,
`text:notes/*.txt`, `laws=jsonl:laws/*.jsonl.zst#body`. The label is the domain of all its
documents; without one it is the stem of the file or the name of the dataset. To add a kind of
source, write the function and add its line here.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.data.documents import Document
from moe_jax.data.sources import embedded, files, tfds_datasets
from moe_jax.errors import UserError

SOURCES = {
    "embedded": embedded.read,
    "text": files.read_text,
    "jsonl": files.read_jsonl,
    "parquet": files.read_parquet,
    "tfds": tfds_datasets.read,
}

USAGE = (
    "embedded[:DOMAIN,...]  text:GLOB  jsonl:GLOB[#FIELD]  parquet:GLOB[#FIELD]  "
    "tfds:NAME[/CONFIG][:SPLIT][#FIELD]"
)


class Spec(NamedTuple):
    """A source spec, taken apart."""

    kind: str  # a key of SOURCES
    argument: str  # what follows "kind:", "" if nothing does
    label: str  # domain of all documents; "" = named by the source


def parse(spec: str) -> Spec:
    """Returns the parts of `[label=]kind[:argument]`; UserError if it names no kind of source."""
    # A name with bytes that are no UTF-8 has surrogates, which do not encode.
    if spec != spec.encode("utf-8", "replace").decode("utf-8"):
        raise UserError(
            f"source {spec!r} has bytes that are no UTF-8: name its files by a glob, with a ? for "
            "each such byte"
        )
    kinds = "|".join(SOURCES)
    match = re.fullmatch(rf"(?:([\w.-]+)=)?({kinds})(?::(.*))?", spec, flags=re.DOTALL)
    if not match:
        raise UserError(
            f"source {spec!r} is none of: {USAGE}, each with an optional LABEL= before it"
        )
    label, kind, argument = match.groups()
    if kind != "embedded" and not argument:
        raise UserError(f"source {spec!r} names nothing after {kind}: the sources are {USAGE}")
    return Spec(kind, argument or "", label or "")


def read(spec: str) -> Iterator[Document]:
    """Yields the documents of a source in a fixed order, without the empty ones.

    UserError if there is no other.
    """
    kind, argument, label = parse(spec)
    empty = True
    for document in SOURCES[kind](argument, label):
        if document.text:
            empty = False
            yield document
    if empty:
        raise UserError(f"source {spec!r} has no text: every document of it is empty")
