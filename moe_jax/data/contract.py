"""What the data of any task is to training, evaluation and the instruments: rows by number, in two
splits.

Row order, shuffling, epochs and resuming are the business of data/batches.py, which needs no more
than this. It is fulfilled by `load.Dataset` (packed text) and `examples.Examples` (labelled texts,
vectors, pairs of sentences, baskets). Shapes: B rows of a batch, R held-out rows, Z domains.
"""

import pathlib
from typing import Any, Protocol

import numpy as np


class Data(Protocol):
    @property
    def domains(self) -> tuple[str, ...]:
        """Labels of held-out rows in the pictures of the routing: domains of text, or classes; at
        least one.
        """
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the parts in the training stream, summing to 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the rows; checked on resume."""
        ...

    @property
    def seq_len(self) -> int:
        """Places of a row: tokens, patches, frames, items."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the run tells of the data at its start, in sentences: what was left out or cut."""
        ...

    def sizes(self, split: str) -> list[int]:
        """Rows of each part; split is "train" or "heldout"."""
        ...

    def batch(
        self,
        split: str,
        part_B: np.ndarray,
        index_B: np.ndarray,
        row_B: np.ndarray,
        there_B: np.ndarray,
    ) -> Any:
        """A NamedTuple of arrays [B, ...]: the rows `index_B` of the parts `part_B`, all of it
        padding where not `there_B`.
        """
        ...

    def heldout_order(self) -> tuple[np.ndarray, np.ndarray]:
        """(part_R, index_R) of every held-out row in the order of evaluation, one of each domain in
        turn.
        """
        ...

    def name(self) -> str:
        """What messages call it."""
        ...

    def save(self, workdir: pathlib.Path) -> None:
        """Writes what reading a model's outputs needs later: the tokenizer, the names of the
        labels.
        """
        ...
