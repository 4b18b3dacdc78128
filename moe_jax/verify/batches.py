"""Changes to a batch that must not matter to some of its losses. NumPy, the same on every mesh.

Shapes: B rows, S sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# What a row says, by the field of the batch, and the field that is 0 where there is padding.
CONTENTS = {
    "tokens_BS": "segment_BS",
    "targets_BS": "segment_BS",
    "values_BSP": "segment_BS",
    "source_BS": "source_segment_BS",
    "items_BL": "weight_BL",
}
# What is predicted: to change it changes the loss, whoever sees it.
LABELS = ("targets_BS", "label_B")


class Change(NamedTuple):
    """A change to a batch, and the predictions whose loss it must not touch."""

    claim: str
    apply: Callable[[Any, np.random.Generator], Any]
    same: Callable[[Any], Any]  # booleans that broadcast to the losses, [B, S] or [B]


def weight(batch: Any, nll: np.ndarray) -> np.ndarray:
    """Returns where a loss counts, with the shape of the losses."""
    names = ("weight_B",) if nll.ndim == 1 else ("weight_BS", "target_weight_BL", "segment_BS")
    return next(getattr(batch, name) for name in names if name in type(batch)._fields) > 0


def changes(batch: Any, nll: np.ndarray, group_rows: int) -> dict[str, Change]:
    """Returns changes by name to a batch with losses like `nll`.

    `group_rows` rows share capacity, so a sequence must change no loss of another group.
    """

    def odd(batch):
        return batch.row_B // group_rows % 2 == 1

    def rows(z_B):
        return z_B.reshape(-1, *[1] * (nll.ndim - 1))

    found = {
        "padding": Change(
            "padding changes nothing, gradients included", _padding, lambda b: weight(b, nll) > 0
        ),
        "sequences": Change(
            "a sequence changes no other's loss",
            lambda b, rng: _redraw(
                b, rng, lambda valid: valid & odd(b).reshape(-1, *[1] * (valid.ndim - 1))
            ),
            lambda b: (weight(b, nll) > 0) & rows(~odd(b)),
        ),
    }
    if not any(name in type(batch)._fields for name in ("segment_BS", "weight_BL")):
        del found["padding"]
    return found


def causal(group_rows: int) -> dict[str, Change]:
    """Returns changes by name to a batch of a model that predicts what comes next: what a later
    token, or another document of the row, must not do.
    """

    def early(batch):
        """Returns where the first half of a row is, and its prefix, where all tokens see each
        other.
        """
        place_1S = np.arange(batch.segment_BS.shape[1])[None]
        prefix_B1 = batch.prefix_BS.sum(1, keepdims=True) if hasattr(batch, "prefix_BS") else 0
        return (place_1S < np.maximum(batch.segment_BS.shape[1] // 2, prefix_B1)) & (
            batch.segment_BS > 0
        )

    # The last row of each group alone: its later tokens come after every other token of the group.
    def last(batch):
        return (batch.row_B % group_rows == group_rows - 1)[:, None]

    return {
        "future": Change(
            "later tokens change no earlier loss",
            lambda b, rng: _tokens(b, rng, (b.segment_BS > 0) & ~early(b) & last(b)),
            early,
        ),
        "document": Change(
            "a document changes no later one's loss",
            lambda b, rng: _tokens(b, rng, b.segment_BS == 1),
            lambda b: b.segment_BS == 2,
        ),
    }


def _tokens(batch: Any, rng: np.random.Generator, where_BS: np.ndarray) -> Any:
    """Returns the batch with other tokens where `where_BS`."""
    return batch._replace(
        tokens_BS=np.where(where_BS, _fresh(batch.tokens_BS, rng), batch.tokens_BS)
    )


def _fresh(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns as many other values; tokens are drawn among those that are there."""
    if np.issubdtype(values.dtype, np.integer):
        return rng.integers(0, values.max() + 1, values.shape).astype(values.dtype)
    return rng.normal(size=values.shape).astype(values.dtype)


def _redraw(
    batch: Any, rng: np.random.Generator, where: Callable, skip: tuple[str, ...] = LABELS
) -> Any:
    """Returns the batch with its contents drawn anew where `where(valid)` says."""
    new = {}
    for name, mask in CONTENTS.items():
        if name in type(batch)._fields and name not in skip:
            values, valid = getattr(batch, name), getattr(batch, mask) > 0
            chosen = where(valid)
            chosen = chosen.reshape(chosen.shape + (1,) * (values.ndim - chosen.ndim))
            new[name] = np.where(chosen, _fresh(values, rng), values)
    return batch._replace(**new)


def _padding(batch: Any, rng: np.random.Generator) -> Any:
    """Returns the batch with other contents in its padding, labels included."""
    return _redraw(batch, rng, lambda valid: ~valid, skip=())
