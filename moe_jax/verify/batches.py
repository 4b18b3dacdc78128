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
    # Booleans that broadcast to the losses, [B, S] or [B].
    same: Callable[[Any], Any]


def weight(batch: Any, nll: np.ndarray) -> np.ndarray:
    """Returns where a loss counts, with the shape of the losses."""
    if nll.ndim == 1:
        names = ("weight_B",)
    else:
        # What predicts beside padding has weights; else padding alone does not count.
        names = ("weight_BS", "target_weight_BL", "segment_BS")
    first = next(name for name in names if name in type(batch)._fields)
    return getattr(batch, first) > 0


def weight_ahead(batch: Any, nll: np.ndarray, k: int) -> np.ndarray:
    """Returns where the loss of the token k places behind the next one counts: its own place is of
    the same document, and counts.
    """
    counts_BS = weight(batch, nll)
    ahead_BS = np.zeros_like(counts_BS)
    for row, place in np.ndindex(counts_BS.shape):
        later = place + k
        if later < counts_BS.shape[1]:
            same = batch.segment_BS[row, place] == batch.segment_BS[row, later]
            ahead_BS[row, place] = same and counts_BS[row, later]
    return ahead_BS


def changes(batch: Any, nll: np.ndarray, group_rows: int) -> dict[str, Change]:
    """Returns changes by name to a batch with losses like `nll`.

    `group_rows` rows share capacity, so a sequence must change no loss of another group.
    """

    def in_odd_group(batch, ndim):
        """Returns booleans [B, 1, ...] with `ndim` dimensions."""
        odd_B = batch.row_B // group_rows % 2 == 1
        return odd_B.reshape(-1, *[1] * (ndim - 1))

    def redraw_odd_groups(batch, rng):
        # Every other group is drawn anew, and the losses of the groups between them are looked at.
        return _redraw(batch, rng, lambda valid: valid & in_odd_group(batch, valid.ndim))

    def counts(batch):
        return weight(batch, nll) > 0

    def counts_in_even_groups(batch):
        return counts(batch) & ~in_odd_group(batch, nll.ndim)

    changes = {}
    if any(name in type(batch)._fields for name in ("segment_BS", "weight_BL")):
        claim = "padding changes nothing, gradients included"
        changes["padding"] = Change(claim, _padding, counts)
    claim = "a sequence changes no other's loss"
    changes["sequences"] = Change(claim, redraw_odd_groups, counts_in_even_groups)
    return changes


def causal(group_rows: int) -> dict[str, Change]:
    """Returns changes by name to a batch of a model that predicts what comes next: what a later
    token, or another document of the row, must not do.
    """

    def early(batch):
        """Returns where the first half of a row is, and its prefix, where all tokens see each
        other.
        """
        length = batch.segment_BS.shape[1]
        # Tokens of a prefix see each other, so none of them is later than another.
        prefix_B1 = batch.prefix_BS.sum(1, keepdims=True) if hasattr(batch, "prefix_BS") else 0
        before_BS = np.arange(length)[None] < np.maximum(length // 2, prefix_B1)
        return before_BS & (batch.segment_BS > 0)

    def redraw_later_tokens(batch, rng):
        # The last row of each group alone: its later tokens come after every other token of the
        # group.
        last_row_B1 = (batch.row_B % group_rows == group_rows - 1)[:, None]
        later_BS = (batch.segment_BS > 0) & ~early(batch)
        return _redraw_tokens(batch, rng, later_BS & last_row_B1)

    def redraw_first_document(batch, rng):
        return _redraw_tokens(batch, rng, batch.segment_BS == 1)

    def in_second_document(batch):
        return batch.segment_BS == 2

    return {
        "future": Change("later tokens change no earlier loss", redraw_later_tokens, early),
        "document": Change(
            "a document changes no later one's loss", redraw_first_document, in_second_document
        ),
    }


def _redraw_tokens(batch: Any, rng: np.random.Generator, where_BS: np.ndarray) -> Any:
    """Returns the batch with other tokens where `where_BS`."""
    tokens_BS = np.where(where_BS, _fresh(batch.tokens_BS, rng), batch.tokens_BS)
    return batch._replace(tokens_BS=tokens_BS)


def _fresh(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns as many other values; tokens are drawn among those that are there."""
    if np.issubdtype(values.dtype, np.integer):
        return rng.integers(0, values.max() + 1, values.shape).astype(values.dtype)
    return rng.normal(size=values.shape).astype(values.dtype)


def _redraw(
    batch: Any, rng: np.random.Generator, where: Callable, skip: tuple[str, ...] = LABELS
) -> Any:
    """Returns the batch with its contents drawn anew where `where(valid)` says."""
    redrawn = {}
    for name, mask in CONTENTS.items():
        if name in type(batch)._fields and name not in skip:
            values, valid = getattr(batch, name), getattr(batch, mask) > 0
            chosen = where(valid)
            # A vector [B, S, P] is drawn anew as a whole.
            chosen = chosen.reshape(chosen.shape + (1,) * (values.ndim - chosen.ndim))
            redrawn[name] = np.where(chosen, _fresh(values, rng), values)
    return batch._replace(**redrawn)


def _padding(batch: Any, rng: np.random.Generator) -> Any:
    """Returns the batch with other contents in its padding, labels included."""
    # Labels too: a wrong one must not count where there is padding.
    return _redraw(batch, rng, lambda valid: ~valid, skip=())
