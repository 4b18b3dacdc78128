"""Batches as a pure function of (seed, step, row): to resume is to ask for another step, and no process needs another.

Shapes: B rows of a batch (or of this process's share of it), S positions.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from moe_jax.data.load import Dataset
from moe_jax.data.pack import Rows, interleaved, positions
from moe_jax.errors import UserError


class Batch(NamedTuple):
    """int32 arrays. Padding has segment 0 and target 0; so has a whole row that fills up the last batch."""

    tokens_BS: np.ndarray
    targets_BS: np.ndarray
    segment_BS: np.ndarray
    position_BS: np.ndarray
    domain_BS: np.ndarray
    row_B: np.ndarray  # place of the row in the batch of all processes


class Batches:
    """The endless shuffled stream of the rows of one split, in batches."""

    def __init__(self, dataset: Dataset, split: str, seed: int, batch_size: int):
        """UserError if the split has fewer rows than one batch."""
        self._dataset, self._split, self._batch_size = dataset, split, batch_size
        self._sizes = [getattr(part, split).num_rows for part in dataset.parts]
        if sum(self._sizes) < batch_size:
            specs = ", ".join(part.spec for part in dataset.parts)
            raise UserError(
                f"{specs}: {sum(self._sizes)} {split} rows of {dataset.seq_len} tokens are too few for one batch of "
                f"{batch_size}: lower train.batch_size or data.seq_len, or take more text"
            )
        self._order = _order(self._sizes, dataset.weights, seed)

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Batch:
        """The given rows (0 .. batch_size - 1) of a step: elements step * batch_size + row of the stream."""
        row_B = np.asarray(rows, np.int32)
        places = np.array([self._order[step * self._batch_size + int(row)] for row in row_B], np.int64).reshape(-1, 2)
        return _batch(self._dataset.fetch(self._split, places[:, 0], places[:, 1]), row_B)

    def epoch(self, step: int) -> float:
        """How often the rows have been seen before `step`; of a mixture, those of the part seen most often."""
        weights = self._dataset.weights
        return max(step * self._batch_size * weight / size for weight, size in zip(weights, self._sizes))


def _order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The endless stream of (part, row): each part shuffled anew in each of its epochs, mixed by weight."""
    streams = [
        grain.MapDataset.range(size).seed(seed).shuffle().repeat().map(lambda row, part=part: (part, row))
        for part, size in enumerate(sizes)
    ]
    order = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
    order[0]  # grain sets itself up at the first element, which must not happen in two threads at once
    return order


def _batch(rows: Rows, row_B: np.ndarray) -> Batch:
    inputs, targets, segment, domain = rows
    return Batch(inputs, targets, segment, positions(segment), domain, row_B)


def prefetch(
    batches: Batches, start_step: int, stop_step: int, rows: Sequence[int] | np.ndarray, depth: int
) -> Generator[Batch, None, None]:
    """Batches of steps start_step .. stop_step - 1, read ahead by threads: `depth` of them (0: none) are kept ready.

    Nothing before start_step is read. Ends its threads when it is exhausted or closed.
    """
    options = grain.ReadOptions(num_threads=min(depth, 2), prefetch_buffer_size=depth)
    steps = grain.MapDataset.range(start_step, stop_step).map(lambda step: batches.rows(step, rows))
    iterator = iter(steps.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def eval_batches(
    dataset: Dataset, batch_size: int, num_batches: int | None = None, rows: Sequence[int] | np.ndarray | None = None
) -> Iterator[Batch]:
    """The held-out rows in a fixed order, one of each domain in turn, so that any first part is even over domains.

    `num_batches` None: all of them, the last batch filled up with padding. `rows`: this process's rows of each batch.
    """
    part_R, index_R = _heldout_order(dataset)
    row_B = np.arange(batch_size, dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    most = -(-len(part_R) // batch_size)
    for number in range(most if num_batches is None else min(num_batches, most)):
        place_B = number * batch_size + row_B
        there_B = place_B < len(part_R)
        place_B = np.where(there_B, place_B, 0)
        fetched = dataset.fetch("heldout", part_R[place_B], index_R[place_B])
        yield _batch(Rows(*(np.where(there_B[:, None], field, 0) for field in fetched)), row_B)


def _heldout_order(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(part, row) of each held-out row in the order of evaluation."""
    ids = [[dataset.domains.index(name) for name in part.domains] for part in dataset.parts]
    domain_R = np.concatenate([np.array(ids[i])[part.heldout_domain_R] for i, part in enumerate(dataset.parts)])
    part_R = np.concatenate([np.full(part.heldout.num_rows, i) for i, part in enumerate(dataset.parts)])
    index_R = np.concatenate([np.arange(part.heldout.num_rows) for part in dataset.parts])
    order_R = interleaved(domain_R)
    return part_R[order_R], index_R[order_R]
