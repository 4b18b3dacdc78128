"""Where text comes from: `read(spec)` yields the documents of a source.

A source is named by a spec: `[label=]kind[:argument]`, for example `embedded:drama,verse`,
`text:notes/*.txt`, `laws=jsonl:laws/*.jsonl.zst#body`. The label is the domain of all its
documents; without one the source names their domains (the stem of the file, the name of the
dataset).

A new kind of source is one file here, with a record `SOURCE`, and one line in SOURCES. The contract
is in contract.py.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax import extras
from moe_jax.data.documents import AnyDocument
from moe_jax.data.sources import chat, embedded, hf, jsonl, parquet, text, tfds
from moe_jax.data.sources.contract import Source
from moe_jax.errors import UserError

SOURCES: dict[str, Source] = {
    "embedded": embedded.SOURCE,
    "text": text.SOURCE,
    "jsonl": jsonl.SOURCE,
    "parquet": parquet.SOURCE,
    "tfds": tfds.SOURCE,
    "hf": hf.SOURCE,
    "chat": chat.SOURCE,
}


class Spec(NamedTuple):
    """A source spec, taken apart."""

    # A key of SOURCES.
    kind: str
    # What follows "kind:", "" if nothing does.
    argument: str
    # Domain of all documents; "" = named by the source.
    label: str


def usage() -> str:
    """Returns how the sources of each kind are written, on one line."""
    return "  ".join(syntax(kind) for kind in SOURCES)


def syntax(kind: str) -> str:
    """Returns how the sources of a kind are written, without a label: `text:GLOB`."""
    return kind + SOURCES[kind].argument_syntax


def parse(spec: str) -> Spec:
    """Returns the parts of `[label=]kind[:argument]`.

    Raises UserError if it names no kind of source, or lacks the argument that this kind needs.
    """
    # A name with bytes that are no UTF-8 has surrogates, which do not encode.
    if spec != spec.encode("utf-8", "replace").decode("utf-8"):
        raise UserError(
            f"source {spec!r} has bytes that are no UTF-8: name its files by a glob, with a ? for "
            "each such byte"
        )
    kinds = "|".join(re.escape(kind) for kind in SOURCES)
    # DOTALL: names of files may have a new line in them.
    match = re.fullmatch(rf"(?:([\w.-]+)=)?({kinds})(?::(.*))?", spec, flags=re.DOTALL)
    if not match:
        raise UserError(
            f"source {spec!r} is none of: {usage()}, each with an optional LABEL= before it"
        )
    label, kind, argument = match.groups()
    if SOURCES[kind].needs_argument and not argument:
        raise UserError(f"source {spec!r} names nothing after {kind}: the sources are {usage()}")
    return Spec(kind, argument or "", label or "")


def packed_by_run(spec: str) -> bool:
    """Returns whether a run packs the text of a spec itself; False for what is no source."""
    try:
        return SOURCES[parse(spec).kind].packed_by_run
    except UserError:
        return False


def read(spec: str) -> Iterator[AnyDocument]:
    """Yields the documents of a source in a fixed order, without the empty ones.

    A label of the spec takes the place of the domains that the source names. Raises UserError if a
    library is missing that this kind of source needs, and if no document has text.
    """
    kind, argument, label = parse(spec)
    source = SOURCES[kind]
    extras.require(f"source {spec!r}", *source.extra_modules)
    is_empty = True
    for document in source.read(argument):
        if not document.text:
            continue
        is_empty = False
        yield document._replace(domain=label) if label else document
    if is_empty:
        raise UserError(f"source {spec!r} has no text: every document of it is empty")
