"""Batches as a pure function of (seed, step, row).

To resume is to ask for another step, and each process reads its own rows without the others.
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
    # Index of the row in the batch of all processes.
    row_B: Any
    # What an instrument asks of the MoE layers (moe.probe.Request, whose arrays are [B, M, ...]
    # for all M blocks of the model); () = nothing.
    request: Any = ()
    # Not 0 where the target is not learned; () = all are.
    quiet_BS: Any = ()


class Batches:
    """The endless shuffled stream of the rows of one split, in batches."""

    def __init__(self, dataset: Data, split: str, seed: int, batch_size: int):
        """Orders the rows. Raises UserError if the split has fewer rows than one batch."""
        self._dataset = dataset
        self._split = split
        self._batch_size = batch_size
        self._sizes = dataset.sizes(split)
        if sum(self._sizes) < batch_size:
            raise UserError(
                f"{dataset.name()}: {sum(self._sizes)} {split} rows of {dataset.seq_len} tokens "
                "are too few for one batch of "
                f"{batch_size}: lower train.batch_size or data.seq_len, or take more data"
            )
        self._order = _order(self._sizes, dataset.weights, seed)

    def rows(self, step: int, rows: Sequence[int] | np.ndarray) -> Any:
        """Returns the given rows (0 .. batch_size - 1) of a step, as `Data.batch` has them.

        Row r is element step * batch_size + r of the stream.
        """
        # [B]: the places of these rows in the batch of all processes.
        row_B = np.asarray(rows, np.int32)
        first = step * self._batch_size
        # Random access into the stream: no row before these is read.
        pairs = [self._order[first + int(row)] for row in row_B]
        part_B, index_B = np.array(pairs, np.int64).reshape(-1, 2).T
        return self._dataset.batch(self._split, part_B, index_B, row_B, np.ones(len(row_B), bool))

    def epoch(self, step: int) -> float:
        """Returns how often the rows were read before `step`.

        Of a mixture it is the part that was read most often.
        """
        # Of the rows so far each part has given its weight's share.
        num_rows = step * self._batch_size
        weights = self._dataset.weights
        return max(num_rows * weight / size for weight, size in zip(weights, self._sizes))


def _order(sizes: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Returns the endless stream of (part, index of the row in it).

    Each part is shuffled anew in each of its epochs; several parts are mixed by weight.
    """
    streams = []
    for part, size in enumerate(sizes):
        # The same seed in every part: each is shuffled in its own range.
        index = grain.MapDataset.range(size).seed(seed).shuffle().repeat()
        streams.append(index.map(lambda row, part=part: (part, row)))
    order = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
    # grain sets itself up at the first element, which must not happen in two threads at once.
    order[0]
    return order


def prefetch(
    batches: Batches, start_step: int, stop_step: int, rows: Sequence[int] | np.ndarray, depth: int
) -> Generator[Any, None, None]:
    """Yields the batches of steps start_step .. stop_step - 1, read ahead by threads.

    The threads keep `depth` batches ready (0: none is read ahead). Nothing before start_step is
    read. The threads end when the generator is exhausted or closed.
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
    """Yields the held-out rows in a fixed order, one of each domain in turn.

    So any first batches are even over the domains. `num_batches` None means all of them; the last
    batch is filled up with padding. `rows`: this process's rows of each batch (None: all).
    """
    part_R, index_R = dataset.heldout_order()
    row_B = np.arange(batch_size, dtype=np.int32) if rows is None else np.asarray(rows, np.int32)
    # Rounded up: the last batch may be filled up.
    most = -(-len(part_R) // batch_size)
    count = most if num_batches is None else min(num_batches, most)
    for number in range(count):
        order_B = number * batch_size + row_B
        valid_B = order_B < len(part_R)
        # Any row does in the place of padding: `valid_B` makes it all 0.
        order_B = np.where(valid_B, order_B, 0)
        yield dataset.batch("heldout", part_R[order_B], index_R[order_B], row_B, valid_B)
