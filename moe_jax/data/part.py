"""One source, opened: rows of both splits that are read by index, whether they lie in memory or on
disk.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_jax.data.pack import Rows
from moe_jax.data.survey import Counts
from moe_jax.data.tokenizer import Tokenizer


class Store(NamedTuple):
    """Rows of one split.

    `fetch` takes indices [n] (any order, repeats allowed) and gives those rows.
    """

    num_rows: int
    fetch: Callable[[np.ndarray], Rows]


class Part(NamedTuple):
    spec: str
    tokenizer: Tokenizer
    seq_len: int
    domains: tuple[str, ...]  # what the rows' domain numbers mean here
    train: Store
    heldout: Store
    heldout_domain_R: (
        np.ndarray
    )  # the domain number of each held-out row: such a row has one domain only
    documents: Counts
    text_bytes: Counts
    heldout_piece_bytes: dict[
        str, int
    ]  # that the ids of the held-out text stand for; other than text_bytes if some were lost
    text: Callable[
        [str, str], bytes
    ]  # (split, domain) -> its documents one after another, perhaps the first only
    fingerprint: str
    notes: tuple[str, ...] = ()  # what the run tells of it at its start


def in_memory(rows: Rows) -> Store:
    return Store(len(rows.tokens_RS), lambda index_N: Rows(*(field[index_N] for field in rows)))
