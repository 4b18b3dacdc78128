"""Random batches with packed documents and padded tails, and the changes to them that must not matter. NumPy, the same on every mesh.

Shapes: B rows, S sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_jax.config import Config
from moe_jax.tasks import lm


def batch(cfg: Config, step: int) -> lm.Inputs:
    """Two documents in each row, cut at random, and up to three places of padding at the end of every other row.

    Documents begin with different tokens, for two equal beginnings tie: where experts choose among tokens, rounding would decide.
    """
    rng = np.random.default_rng([cfg.seed, step])
    num, length = cfg.train.batch_size, cfg.data.seq_len
    tokens = rng.integers(1, cfg.model.vocab_size, (num, length + 1), dtype=np.int32)
    cut, tail = rng.integers(2, length - 4, (num, 1)), rng.integers(1, 4, (num, 1))
    first = np.resize(rng.permutation(np.arange(1, cfg.model.vocab_size)), (num, 2))
    tokens[:, :1] = first[:, :1]
    np.put_along_axis(tokens, cut, first[:, 1:], 1)
    place = np.arange(length, dtype=np.int32)[None]
    segment = np.where(place < cut, 1, 2)
    segment[::2] = np.where(place < length - tail, segment, 0)[::2]
    position = np.where(place < cut, place, place - cut)
    whole = lambda z: z.astype(np.int32)
    row = np.arange(num, dtype=np.int32)
    return lm.Inputs(tokens[:, :-1], tokens[:, 1:], whole(segment), whole(position), whole(0 * segment), row)


class Change(NamedTuple):
    """A change to a batch, and the places whose loss it must not touch."""

    claim: str
    apply: Callable[[lm.Inputs, np.random.Generator], lm.Inputs]
    same: Callable[[lm.Inputs], Any]  # [B, S] booleans


def changes(group_rows: int) -> dict[str, Change]:
    """Changes by name; `group_rows` rows share capacity, so that "a sequence changes no other's loss" are those of other groups."""
    half = lambda batch: batch.segment_BS.shape[1] // 2
    early = lambda batch: (np.arange(batch.segment_BS.shape[1]) < half(batch))[None] & (batch.segment_BS > 0)
    # The last row of each group alone: its later tokens come after every other token of the group.
    last = lambda batch: (batch.row_B % group_rows == group_rows - 1)[:, None]
    odd = lambda batch: (batch.row_B // group_rows % 2 == 1)[:, None]
    return {
        "padding": Change("padding changes nothing, gradients included", _padding, lambda batch: batch.segment_BS > 0),
        "future": Change(
            "later tokens change no earlier loss",
            lambda b, rng: _tokens(b, rng, (b.segment_BS > 0) & ~early(b) & last(b)),
            early,
        ),
        "sequences": Change(
            "a sequence changes no other's loss",
            lambda b, rng: _tokens(b, rng, (b.segment_BS > 0) & odd(b)),
            lambda b: (b.segment_BS > 0) & ~odd(b),
        ),
        "document": Change(
            "a document changes no later one's loss",
            lambda b, rng: _tokens(b, rng, b.segment_BS == 1),
            lambda b: b.segment_BS == 2,
        ),
    }


def _tokens(batch: lm.Inputs, rng: np.random.Generator, where_BS: np.ndarray) -> lm.Inputs:
    fresh = rng.integers(0, batch.tokens_BS.max() + 1, batch.tokens_BS.shape, dtype=np.int32)
    return batch._replace(tokens_BS=np.where(where_BS, fresh, batch.tokens_BS))


def _padding(batch: lm.Inputs, rng: np.random.Generator) -> lm.Inputs:
    pad_BS = batch.segment_BS == 0
    fresh = rng.integers(0, batch.tokens_BS.max() + 1, batch.tokens_BS.shape, dtype=np.int32)
    return _tokens(batch, rng, pad_BS)._replace(targets_BS=np.where(pad_BS, fresh, batch.targets_BS))
