"""One opened source: rows of both splits by index, whether they lie in memory or on disk."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_jax.data.pack import Rows
from moe_jax.data.survey import Counts
from moe_jax.data.tokenizer.contract import Tokenizer


class Store(NamedTuple):
    """The rows of one split.

    `fetch` takes indices [n] (any order, repeats allowed) and returns those rows.
    """

    num_rows: int
    fetch: Callable[[np.ndarray], Rows]


class Part(NamedTuple):
    """Packed text of one source, with what is known of it."""

    spec: str
    tokenizer: Tokenizer
    seq_len: int
    # Names of the rows' domain numbers.
    domains: tuple[str, ...]
    train: Store
    heldout: Store
    # The domain number of each held-out row, which has text of one domain only.
    heldout_domain_R: np.ndarray
    documents: Counts
    text_bytes: Counts
    # Bytes that the ids of the held-out text stand for, by domain. They differ from text_bytes
    # where a tokenizer loses or adds some.
    heldout_piece_bytes: dict[str, int]
    # (split, domain) -> its documents one after another, perhaps the first of them only
    text: Callable[[str, str], bytes]
    fingerprint: str
    # Some targets are not learned (pack.Rows.quiet_RS).
    has_quiet: bool = False
    # Sentences for the log of the run at its start.
    notes: tuple[str, ...] = ()


def in_memory(rows: Rows) -> Store:
    """Returns a store of rows that are already arrays."""

    def fetch(index_N: np.ndarray) -> Rows:
        return rows.each(lambda field: field[index_N])

    return Store(len(rows.tokens_RS), fetch)
