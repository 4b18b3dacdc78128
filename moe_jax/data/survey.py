"""Counts what a source holds by reading it once: domains, documents, bytes, and their digest."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moe_jax.data.documents import AnyDocument
from moe_jax.data.pack import SPLITS
from moe_jax.data.tokenizer.contract import Tokenizer
from moe_jax.errors import UserError

# A row stores the domain of each token in a byte.
MOST_DOMAINS = 256

# Split -> domain -> number.
Counts = dict[str, dict[str, int]]


class Survey(NamedTuple):
    """Holds what a source holds."""

    # In the order of their first documents.
    domains: tuple[str, ...]
    documents: Counts
    # In UTF-8.
    text_bytes: Counts
    # SHA-256 of all documents with their domains and splits, in order.
    digest: str
    # Some document is not learned whole.
    has_quiet: bool = False


def survey(documents: Iterable[tuple[str, AnyDocument]]) -> Survey:
    """Returns the counts of (split, document) pairs. Raises UserError for too many domains."""
    counts: Counts = {split: {} for split in SPLITS}
    sizes: Counts = {split: {} for split in SPLITS}
    digest = hashlib.sha256()
    has_quiet = False
    for split, document in documents:
        text, domain = document.text, document.domain
        data = text.encode("utf-8")
        # Both splits list every domain, in the order of its first document.
        for name in SPLITS:
            counts[name].setdefault(domain, 0)
            sizes[name].setdefault(domain, 0)
        counts[split][domain] += 1
        sizes[split][domain] += len(data)
        # With their lengths, so that no two lists of documents have the same bytes in a row.
        digest.update(f"{split}\0{domain}\0{len(data)}\0".encode() + data)
        if document.learned is not None:
            has_quiet = True
            lengths = [len(piece) for piece in document.pieces]
            digest.update(repr((lengths, document.learned)).encode())
        if len(counts["train"]) > MOST_DOMAINS:
            raise UserError(
                f"more than {MOST_DOMAINS} domains: give each source one label, as in "
                "LABEL=text:GLOB"
            )
    return Survey(tuple(counts["train"]), counts, sizes, digest.hexdigest(), has_quiet)


def fingerprint(
    survey: Survey, tokenizer: Tokenizer, seq_len: int, heldout_every: int, seed: int
) -> str:
    """Returns the sha256 of what decides the rows: documents, tokenizer, arguments of packing."""
    arguments = [survey.digest, tokenizer.fingerprint, seq_len, heldout_every, seed]
    return hashlib.sha256(json.dumps(arguments).encode()).hexdigest()


def only(documents: Iterable[tuple[str, AnyDocument]], split: str) -> Iterator[AnyDocument]:
    """Returns the documents of one split."""
    return (document for name, document in documents if name == split)
