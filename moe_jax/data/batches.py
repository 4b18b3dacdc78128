"""Batches as a pure function of (seed, step, row): to resume is to ask for another step, and no
process needs another.

Shapes: B rows of a batch (or of this process's share of it), S positions.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from moe_jax.data.contract import Data
from moe_jax.errors import UserError


class PackedText(NamedTuple):
    """A batch of packed text: int32 arrays on the host or on the mesh.

    Padding has segment 0 and target 0; so has a whole row that fills up the last batch.
    """

    tokens_BS: Any
    targets_BS: Any
    segment_BS: Any
    position_BS: Any
    domain_BS: Any
    row_B: Any  # number of the row in the batch of all processes
    # What an instrument asks of the MoE layers (moe.probe.Request, whose arrays are [B, M, ...]
    # for all M blocks of the model); () = nothing.
    request: Any = ()


class Batches:
    """The endless shuffled stream of the rows of one split, in batches."""

    def __init__(self, dataset: Data, split: str, seed: int, batch_size: int):
        """UserError if the split has fewer rows than one batch."""
        self._dataset, self._split, self._batch_size = dataset, split, batch_size
        self._sizes = dataset.sizes(split)
        if sum(self._sizes) < batch_size:
            raise UserError(
                f"{dataset.name()}: {sum(self._sizes)} {split} rows of {dataset.seq_len} tokens "
                "are too few for one batch of "
                f"{batch_size}: lower train.batch_size or data.seq_len, or take more data"
            )
        self._order = _order(self._sizes, dataset.weights, seed)

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Any:
        """The given rows (0 .. batch_size - 1) of a step: elements step * batch_size + row of the
        stream.
        """
        row_B = np.asarray(rows, np.int32)
        places = np.array(
            [self._order[step * self._batch_size + int(row)] for row in row_B], np.int64
        ).reshape(-1, 2)
        return self._dataset.batch(
            self._split, places[:, 0], places[:, 1], row_B, np.ones(len(row_B), bool)
        )

    def epoch(self, step: int) -> float:
        """How often the rows have been seen before `step`; of a mixture, those of the part seen
        most often.
        """
        weights = self._dataset.weights
        return max(
            step * self._batch_size * weight / size for weight, size in zip(weights, self._sizes)
        )


def _order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """The endless stream of (part, row): each part shuffled anew in each of its epochs, mixed by
    weight.
    """
    streams = [
        grain.MapDataset.range(size)
        .seed(seed)
        .shuffle()
        .repeat()
        .map(lambda row, part=part: (part, row))
        for part, size in enumerate(sizes)
    ]
    order = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
    order[
        0
    ]  # grain sets itself up at the first element, which must not happen in two threads at once
    return order


def prefetch(
    batches: Batches, start_step: int, stop_step: int, rows: Sequence[int] | np.ndarray, depth: int
) -> Generator[Any, None, None]:
    """Batches of steps start_step .. stop_step - 1, read ahead by threads:

    `depth` of them (0: none) are kept ready.

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
    dataset: Data,
    batch_size: int,
    num_batches: int | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Any]:
    """The held-out rows in a fixed order, one of each domain in turn, so that any first part is
    even over domains.

    `num_batches` None: all of them, the last batch filled up with padding. `rows`: this process's
    rows of each batch.
    """
    part_R, index_R = dataset.heldout_order()
    row_B = np.arange(batch_size, dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    most = -(-len(part_R) // batch_size)
    for number in range(most if num_batches is None else min(num_batches, most)):
        place_B = number * batch_size + row_B
        there_B = place_B < len(part_R)
        place_B = np.where(there_B, place_B, 0)
        yield dataset.batch("heldout", part_R[place_B], index_R[place_B], row_B, there_B)
