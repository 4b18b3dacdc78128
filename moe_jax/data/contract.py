"""The data of a task as training, evaluation and the instruments see it: rows by index, two splits.

Row order, shuffling, epochs and resuming are the business of data/batches.py, which needs no more
than this. It is fulfilled by `load.Dataset` (packed text) and `examples.Examples` (labelled texts,
vectors, pairs of sentences, baskets). The held-out split is called "heldout" in names of files and
of functions. Shapes: B rows of a batch, R held-out rows, Z domains.
"""

import pathlib
from typing import Any, Protocol

import numpy as np


class Data(Protocol):
    @property
    def domains(self) -> tuple[str, ...]:
        """Returns the names [Z] that tell held-out rows apart: domains of text, or classes."""
        ...

    @property
    def weights(self) -> tuple[float, ...]:
        """Returns the share of each part in the training stream, summing to 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """Returns the sha256 of what decides the rows; a run that resumes compares it."""
        ...

    @property
    def seq_len(self) -> int:
        """Returns the number of positions of a row: tokens, patches, frames or items."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the log of the run at its start: what was left out or cut."""
        ...

    def sizes(self, split: str) -> list[int]:
        """Returns the number of rows of each part; split is "train" or "heldout"."""
        ...

    def batch(
        self,
        split: str,
        part_B: np.ndarray,
        index_B: np.ndarray,
        row_B: np.ndarray,
        valid_B: np.ndarray,
    ) -> Any:
        """Returns a NamedTuple of arrays [B, ...]: the rows `index_B` of the parts `part_B`.

        `row_B` goes into it as it is. A row is all padding where not `valid_B`.
        """
        ...

    def heldout_order(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (part_R, index_R) of all held-out rows in the order of evaluation.

        It takes one row of each domain in turn.
        """
        ...

    def name(self) -> str:
        """Returns the name of the data in messages."""
        ...

    def save(self, workdir: pathlib.Path) -> None:
        """Writes what a reader of the model's outputs needs: tokenizer, names of the labels."""
        ...
