"""Documents into rows of fixed length, none wasted and none mixed up; and which documents are held
out.

A document of n tokens becomes n + 1 predictions: tokens [boundary, t1 .. tn], targets [t1 .. tn,
boundary], so every token of the text is predicted exactly once. Documents are laid one after
another; one that a row's end cuts goes on in the next row as a new segment. Shapes: R rows, S
positions of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.data.documents import Document
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

SPLITS = ("train", "heldout")
WINDOW_BYTES = (
    1 << 25
)  # documents are shuffled within windows of 32 MB of text, so that memory is bounded
ENCODE_DOCUMENTS = 256  # texts given to the tokenizer at once: its threads share them


class Rows(NamedTuple):
    """Packed text, in the smallest unsigned types; padding has segment 0, and 0 everywhere else."""

    tokens_RS: np.ndarray
    targets_RS: np.ndarray
    segment_RS: np.ndarray  # 1, 2, ... in each row: attention stays inside one
    domain_RS: np.ndarray  # index into the names of the domains


def pack(documents: Sequence[tuple[np.ndarray, int]], seq_len: int, tokenizer: Tokenizer) -> Rows:
    """Lays (tokens, domain) after one another in rows of `seq_len`; the last row is padded."""
    lengths = np.array([len(tokens) + 1 for tokens, _ in documents], np.int64)
    total = int(lengths.sum())
    num_rows = -(-total // seq_len)
    boundary = np.array([tokenizer.boundary_id], tokenizer.dtype)
    flat = np.concatenate(
        [part for tokens, _ in documents for part in (boundary, tokens)] + [boundary]
    )
    flat = flat.astype(tokenizer.dtype, copy=False)

    def rows(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        out = np.zeros(num_rows * seq_len, dtype)
        out[:total] = values
        return out.reshape(num_rows, seq_len)

    begins_RS = np.zeros(num_rows * seq_len, bool)
    begins_RS[np.cumsum(lengths) - lengths] = True
    begins_RS = begins_RS.reshape(num_rows, seq_len)
    begins_RS[:, 0] = True  # also what the row before has begun
    # A segment has two places or more, but for the first of a row, which may be the end of one.
    segment_RS = np.cumsum(begins_RS, axis=1, dtype=np.min_scalar_type(seq_len // 2 + 1))
    segment_RS.reshape(-1)[total:] = 0
    domain = np.repeat(np.array([domain for _, domain in documents], np.uint8), lengths)
    # Behind a document's last token stands the boundary of the next, so the targets are the tokens
    # one place on.
    tokens_RS, targets_RS = (rows(part, tokenizer.dtype) for part in (flat[:-1], flat[1:]))
    return Rows(tokens_RS, targets_RS, segment_RS, rows(domain, np.dtype(np.uint8)))


def positions(segment_BS: np.ndarray) -> np.ndarray:
    """int32 [B, S]: the place of each token in its segment, from 0; 0 in padding."""
    place_S = np.arange(segment_BS.shape[1], dtype=np.int32)
    begins_BS = np.diff(segment_BS.astype(np.int32), axis=1, prepend=-1) != 0
    start_BS = np.maximum.accumulate(np.where(begins_BS, place_S, 0), axis=1)
    return np.where(segment_BS > 0, place_S - start_BS, 0).astype(np.int32)


def split(documents: Iterable[Document], heldout_every: int) -> Iterator[tuple[str, Document]]:
    """Pairs each document with its split: of each domain every `heldout_every`-th is held out.

    UserError, at the end, for a domain with so few documents that none is held out.
    """
    seen: dict[str, int] = {}
    for document in documents:
        number = seen[document.domain] = seen.get(document.domain, 0) + 1
        yield ("train" if number % heldout_every else "heldout"), document
    for domain, number in seen.items():
        if number < heldout_every:
            count, fewer = f"{number} documents", f"lower heldout_every to at most {number}, "
            if number == 1:
                count, fewer = (
                    "1 document",
                    "",
                )  # no heldout_every holds out the only one and trains on it
            raise UserError(
                f"heldout_every is {heldout_every}, but domain {domain} has only {count}, so none "
                f"is held out: {fewer}make one "
                "domain of several files by a label (books=text:GLOB), or cut the text into more "
                "documents"
            )


def shuffled_windows(
    documents: Iterable[Document], seed: int, window_bytes: int
) -> Iterator[list[Document]]:
    """Windows of about `window_bytes` of text, the documents of each in an order drawn from `seed`."""
    for number, window in enumerate(windows(documents, window_bytes)):
        order = np.random.default_rng((seed, number)).permutation(len(window))
        yield [window[i] for i in order]


def windows(documents: Iterable[Document], window_bytes: int) -> Iterator[list[Document]]:
    """Consecutive documents in lists of at least `window_bytes` of text (the last may have less)."""
    window: list[Document] = []
    size = 0
    for document in documents:
        window.append(document)
        size += len(document.text)
        if size >= window_bytes:
            yield window
            window, size = [], 0
    if window:
        yield window


def encode(
    documents: Sequence[Document], tokenizer: Tokenizer, domains: Sequence[str]
) -> list[tuple[np.ndarray, int]]:
    """(tokens, index of the domain) of each document that has tokens (a tokenizer may drop white
    space).
    """
    index = {name: i for i, name in enumerate(domains)}
    pairs: list[tuple[np.ndarray, int]] = []
    for i in range(0, len(documents), ENCODE_DOCUMENTS):
        some = documents[i : i + ENCODE_DOCUMENTS]
        encoded = tokenizer.encode_many([document.text for document in some])
        pairs += [
            (tokens, index[document.domain])
            for tokens, document in zip(encoded, some)
            if len(tokens)
        ]
    return pairs


def pack_train(
    documents: Iterable[Document],
    seq_len: int,
    tokenizer: Tokenizer,
    domains: Sequence[str],
    seed: int,
) -> Iterator[Rows]:
    """Rows of training documents, all domains shuffled together; one block of rows per window."""
    for window in shuffled_windows(documents, seed, WINDOW_BYTES):
        yield pack(encode(window, tokenizer, domains), seq_len, tokenizer)


def pack_heldout(
    documents: Iterable[Document], seq_len: int, tokenizer: Tokenizer, domains: Sequence[str]
) -> Iterator[Rows]:
    """Rows of held-out documents, each of one domain, so that an evaluation can be even over the
    domains.
    """
    for window in windows(documents, WINDOW_BYTES):
        for domain in domains:
            some = [document for document in window if document.domain == domain]
            if some:
                yield pack(encode(some, tokenizer, domains), seq_len, tokenizer)


def interleaved(domain_R: np.ndarray) -> np.ndarray:
    """An order of rows that takes one of each domain in turn, as long as each has any: [R] indices."""
    rank_R = np.zeros(len(domain_R), np.int64)
    for domain in np.unique(domain_R):
        mine = domain_R == domain
        rank_R[mine] = np.arange(mine.sum())
    return np.lexsort((domain_R, rank_R))
