"""Packs documents into rows of fixed length, and chooses which documents are held out.

A document of n tokens becomes n + 1 predictions: tokens [boundary, t1 .. tn], targets [t1 .. tn,
boundary], so every token of the text is predicted exactly once. Documents are laid one after
another; one that a row's end cuts goes on in the next row as a new segment. Shapes: R rows, S
positions of a row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.documents import AnyDocument
from moe_jax.data.tokenizer.contract import Tokenizer
from moe_jax.errors import UserError

SPLITS = ("train", "heldout")
# Documents are shuffled within windows of 2^25 characters, so that memory is bounded.
WINDOW_CHARACTERS = 1 << 25
# Texts given to the tokenizer at once: its threads share them.
ENCODE_DOCUMENTS = 256


class Rows(NamedTuple):
    """Packed text in the smallest unsigned types; padding is 0 in every field."""

    tokens_RS: np.ndarray
    targets_RS: np.ndarray
    # 1, 2, ... in each row: attention stays inside one.
    segment_RS: np.ndarray
    # Index into the names of the domains.
    domain_RS: np.ndarray
    # 1 where the target is not learned, as in the questions of a chat; None = all are learned.
    quiet_RS: np.ndarray | None = None

    def each(self, f: Callable[[np.ndarray], np.ndarray]) -> "Rows":
        """Returns f of each field that is there."""
        fields = [f(field) for field in self[:4]]
        quiet_RS = None if self.quiet_RS is None else f(self.quiet_RS)
        return Rows(*fields)._replace(quiet_RS=quiet_RS)


class Encoded(NamedTuple):
    """A document as ids."""

    tokens: np.ndarray
    # Index into the names of the domains.
    domain: int
    # For each token, and for the boundary behind the last: True = not learned. None = all are.
    quiet: np.ndarray | None = None


def pack(documents: Sequence[tuple[Any, ...]], seq_len: int, tokenizer: Tokenizer) -> Rows:
    """Lays documents (the fields of Encoded) after one another in rows of `seq_len`; the last row
    is padded.
    """
    encoded = [Encoded(*document) for document in documents]
    lengths = np.array([len(document.tokens) + 1 for document in encoded], np.int64)
    # Rounded up: the last row has padding.
    num_rows = -(-int(lengths.sum()) // seq_len)
    boundary = np.array([tokenizer.boundary_id], tokenizer.dtype)
    # flat: boundary, document, boundary, document, ..., boundary. Behind a document's last token
    # stands the boundary of the next, so the targets are the inputs one position on. With rows of
    # 4, the documents "abc" and "d", and | for the boundary:
    #     tokens   | a b c    | d 0 0
    #     targets  a b c |    d | 0 0
    #     segment  1 1 1 1    1 1 0 0
    pieces = [boundary]
    for document in encoded:
        pieces += [document.tokens, boundary]
    flat = np.concatenate(pieces).astype(tokenizer.dtype, copy=False)
    domains = np.array([document.domain for document in encoded], np.uint8)
    quiet_RS = None
    if any(document.quiet is not None for document in encoded):
        quiet = [np.zeros(length, np.uint8) for length in lengths]
        for place, document in zip(quiet, encoded):
            place[:] = 0 if document.quiet is None else document.quiet
        quiet_RS = _in_rows(np.concatenate(quiet), num_rows, seq_len)
    return Rows(
        tokens_RS=_in_rows(flat[:-1], num_rows, seq_len),
        targets_RS=_in_rows(flat[1:], num_rows, seq_len),
        segment_RS=_segments(lengths, num_rows, seq_len),
        domain_RS=_in_rows(np.repeat(domains, lengths), num_rows, seq_len),
        quiet_RS=quiet_RS,
    )


def _in_rows(values: np.ndarray, num_rows: int, seq_len: int) -> np.ndarray:
    """Returns `values` [n] as rows [R, S] of their type; what is left of the last row is 0."""
    padded = np.zeros(num_rows * seq_len, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(num_rows, seq_len)


def _segments(lengths: np.ndarray, num_rows: int, seq_len: int) -> np.ndarray:
    """Returns the segments [R, S], 1, 2, ... in each row, of documents of these lengths."""
    begins = np.zeros(num_rows * seq_len, bool)
    # Where each document begins among all positions.
    begins[np.cumsum(lengths) - lengths] = True
    begins_RS = begins.reshape(num_rows, seq_len)
    # A document that goes on from the row before is a new segment here.
    begins_RS[:, 0] = True
    # A segment has at least two positions, except the first of a row, which may be the last
    # position of a document. So seq_len // 2 + 1 is the largest number.
    segment_RS = np.cumsum(begins_RS, axis=1, dtype=np.min_scalar_type(seq_len // 2 + 1))
    segment_RS.reshape(-1)[int(lengths.sum()) :] = 0
    return segment_RS


def positions(segment_BS: np.ndarray) -> np.ndarray:
    """Returns the position of each token in its segment, from 0, int32 [B, S]; 0 in padding."""
    position_S = np.arange(segment_BS.shape[1], dtype=np.int32)
    # True where the segment differs from that of the position before.
    begins_BS = np.diff(segment_BS.astype(np.int32), axis=1, prepend=-1) != 0
    # The position of the last beginning so far, at every position.
    start_BS = np.maximum.accumulate(np.where(begins_BS, position_S, 0), axis=1)
    return np.where(segment_BS > 0, position_S - start_BS, 0).astype(np.int32)


def split(
    documents: Iterable[AnyDocument], heldout_every: int
) -> Iterator[tuple[str, AnyDocument]]:
    """Pairs each document with its split: of each domain every `heldout_every`-th is held out.

    Raises UserError, at the end, for a domain with so few documents that none is held out.
    """
    counts: dict[str, int] = {}
    for document in documents:
        # Documents are counted domain by domain, so each domain is held out in the same share.
        count = counts.get(document.domain, 0) + 1
        counts[document.domain] = count
        yield ("train" if count % heldout_every else "heldout"), document
    for domain, count in counts.items():
        if count < heldout_every:
            raise _none_held_out(domain, count, heldout_every)


def _none_held_out(domain: str, count: int, heldout_every: int) -> UserError:
    """Returns the error for a domain of fewer documents than `heldout_every`."""
    # No heldout_every holds out an only document and trains on it.
    lower = f"lower heldout_every to at most {count}, " if count > 1 else ""
    documents = f"{count} documents" if count > 1 else "1 document"
    return UserError(
        f"heldout_every is {heldout_every}, but domain {domain} has only {documents}, so none "
        f"is held out: {lower}make one domain of several files by a label (books=text:GLOB), or "
        "cut the text into more documents"
    )


def shuffled_windows(
    documents: Iterable[AnyDocument], seed: int, window_characters: int
) -> Iterator[list[AnyDocument]]:
    """Yields windows of about `window_characters`, each in an order drawn from `seed`."""
    for number, window in enumerate(windows(documents, window_characters)):
        # The number of the window is in the seed, or all windows would be shuffled alike.
        order = np.random.default_rng((seed, number)).permutation(len(window))
        yield [window[i] for i in order]


def windows(
    documents: Iterable[AnyDocument], window_characters: int
) -> Iterator[list[AnyDocument]]:
    """Yields lists of consecutive documents, at least `window_characters` long but for the last."""
    window: list[AnyDocument] = []
    size = 0
    for document in documents:
        window.append(document)
        size += len(document.text)
        if size >= window_characters:
            yield window
            window = []
            size = 0
    if window:
        yield window


def encode(
    documents: Sequence[AnyDocument], tokenizer: Tokenizer, domains: Sequence[str]
) -> list[Encoded]:
    """Returns each document that has tokens.

    A tokenizer may drop white space, so a document may have none. UserError for a document in
    pieces and a tokenizer that puts a space before each.
    """
    domain_index = {name: i for i, name in enumerate(domains)}
    found: list[Encoded] = []
    for start in range(0, len(documents), ENCODE_DOCUMENTS):
        batch = documents[start : start + ENCODE_DOCUMENTS]
        pieces = iter(tokenizer.encode_many([text for doc in batch for text in doc.pieces]))
        for document in batch:
            of_document = [next(pieces) for _ in document.pieces]
            tokens = np.concatenate(of_document)
            # A document without tokens would be a boundary that predicts a boundary.
            if len(tokens):
                quiet = _quiet(document, of_document, tokenizer)
                found.append(Encoded(tokens, domain_index[document.domain], quiet))
    return found


def _quiet(
    document: AnyDocument, pieces: Sequence[np.ndarray], tokenizer: Tokenizer
) -> np.ndarray | None:
    """Returns which targets of a document are not learned, [tokens + 1]; None = all are."""
    if document.learned is None:
        return None
    if tokenizer.prefix_space:
        raise UserError(
            f"tokenizer {tokenizer.name} puts a space before each piece of a chat, which no answer "
            "begins with: take another tokenizer, such as bpe:8192"
        )
    lengths = [len(piece) for piece in pieces]
    # The boundary behind the last piece says that it has ended, which is learned with it.
    lengths[-1] += 1
    return np.repeat(~np.array(document.learned), lengths)


def pack_train(
    documents: Iterable[AnyDocument],
    seq_len: int,
    tokenizer: Tokenizer,
    domains: Sequence[str],
    seed: int,
) -> Iterator[Rows]:
    """Yields rows of training documents, a block per window, all domains shuffled together."""
    for window in shuffled_windows(documents, seed, WINDOW_CHARACTERS):
        yield pack(encode(window, tokenizer, domains), seq_len, tokenizer)


def pack_heldout(
    documents: Iterable[AnyDocument], seq_len: int, tokenizer: Tokenizer, domains: Sequence[str]
) -> Iterator[Rows]:
    """Yields the rows of held-out documents.

    Each row has text of one domain only, so that an evaluation can be even over the domains.
    """
    for window in windows(documents, WINDOW_CHARACTERS):
        for domain in domains:
            of_domain = [document for document in window if document.domain == domain]
            if of_domain:
                yield pack(encode(of_domain, tokenizer, domains), seq_len, tokenizer)


def interleaved(domain_R: np.ndarray) -> np.ndarray:
    """Returns row indices [R] that take one row of each domain in turn, while each has any."""
    # The how many-th row of its domain each row is. Of the domains 0 0 0 1 1: 0 1 2 0 1, and the
    # order is 0 3 1 4 2.
    rank_R = np.zeros(len(domain_R), np.int64)
    for domain in np.unique(domain_R):
        of_domain_R = domain_R == domain
        rank_R[of_domain_R] = np.arange(of_domain_R.sum())
    # By rank first and then by domain: the first row of each, then the second of each.
    return np.lexsort((domain_R, rank_R))
