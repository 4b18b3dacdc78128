"""Examples in memory: labelled texts and vectors, pairs of sentences, baskets of items.

Each example is one row; nothing is packed. A row is built from compact arrays when it is asked for.

`Examples` does not know what is in a row: it is generic over the NamedTuple of a task's batch. The
kinds of batches stand here. In all of them padding has segment 0 (or weight 0), tokens 0 and
position 0, and arrays are int32 where no other type is named. Shapes: B rows, S positions of a row,
P width of a vector, L items of a basket, N examples, R held-out rows.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.pack import interleaved

# The arrays of a batch by name, all but row_B.
Fields = dict[str, np.ndarray]


class LabelledTokens(NamedTuple):
    """Texts with one label each.

    A text begins with the tokenizer's boundary, as the rows of a language model do.
    """

    tokens_BS: Any
    # 1 where there is a token.
    segment_BS: Any
    position_BS: Any
    domain_B: Any
    label_B: Any
    # float32; 0 = the row only fills up a batch.
    weight_B: Any
    row_B: Any


class LabelledVectors(NamedTuple):
    """Patches of images or frames of recordings with one label each.

    The values are standardised by the mean and the deviation of the training part.
    """

    values_BSP: Any  # float32
    segment_BS: Any
    position_BS: Any
    domain_B: Any
    label_B: Any
    weight_B: Any  # float32
    row_B: Any


class SourceTarget(NamedTuple):
    """Pairs of sentences for an encoder and a decoder.

    The source ends in the boundary; the target's inputs begin with it, its targets end in it.
    """

    source_BS: Any
    source_segment_BS: Any
    tokens_BS: Any
    targets_BS: Any
    segment_BS: Any
    position_BS: Any
    domain_BS: Any
    row_B: Any


class PrefixTarget(NamedTuple):
    """Pairs of sentences in one row: boundary, source, boundary, target.

    Only predictions of the target and of the boundary after it have a weight.
    """

    tokens_BS: Any
    targets_BS: Any
    segment_BS: Any
    position_BS: Any
    domain_BS: Any
    # 1 where the loss counts, float32.
    weight_BS: Any
    # 1 on the source and both boundaries around it, which may all see each other.
    prefix_BS: Any
    row_B: Any


class Baskets(NamedTuple):
    """The items of users and the items to predict.

    In training these are the same items; of a held-out user they are others.
    """

    items_BL: Any
    # float32; 0 = padding.
    weight_BL: Any
    targets_BL: Any
    target_weight_BL: Any  # float32
    domain_B: Any
    row_B: Any


class Examples(NamedTuple):
    """Rows of both splits in memory; fulfils data/contract.py with one part."""

    # The name in messages.
    spec: str
    # One of the NamedTuples above.
    batch_type: type
    seq_len: int
    domains: tuple[str, ...]
    # {split: number of rows}.
    rows: Mapping[str, int]
    # (split, index_B) -> the fields of a batch but row_B
    fetch: Callable[[str, np.ndarray], Fields]
    heldout_domain_R: np.ndarray
    fingerprint: str
    # What the task and its baselines know beside the rows: Classes, Pairs or Market.
    about: Any
    # What was left out or cut, in sentences for the log of the run.
    notes: tuple[str, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        return (1.0,)

    def sizes(self, split: str) -> list[int]:
        return [self.rows[split]]

    def name(self) -> str:
        return self.spec

    def batch(
        self,
        split: str,
        part_B: np.ndarray,
        index_B: np.ndarray,
        row_B: np.ndarray,
        valid_B: np.ndarray,
    ) -> Any:
        """Returns the rows `index_B` as `batch_type`, 0 where not `valid_B`; `part_B` is 0."""
        fields = self.fetch(split, index_B)
        masked = {name: _masked(values, valid_B) for name, values in fields.items()}
        return self.batch_type(**masked, row_B=row_B)

    def heldout_order(self) -> tuple[np.ndarray, np.ndarray]:
        order_R = interleaved(self.heldout_domain_R)
        return np.zeros_like(order_R), order_R

    def save(self, workdir: pathlib.Path) -> None:
        self.about.save(workdir)

    def fewer(self, train: int, heldout: int) -> "Examples":
        """Returns at most so many rows of each split, spread evenly over it.

        `about` keeps what belongs to these rows.
        """
        most_rows = {"train": train, "heldout": heldout}
        # Evenly spaced, because rows may be sorted by class.
        kept = {split: _spread(self.rows[split], most) for split, most in most_rows.items()}
        return self._replace(
            rows={split: len(index) for split, index in kept.items()},
            fetch=lambda split, index_B: self.fetch(split, kept[split][index_B]),
            heldout_domain_R=self.heldout_domain_R[kept["heldout"]],
            about=self.about.fewer(most_rows),
        )


def _spread(num_rows: int, most: int) -> np.ndarray:
    """Returns the indices of at most `most` of `num_rows` rows, evenly spaced, int64."""
    return np.linspace(0, num_rows - 1, min(num_rows, most)).round().astype(np.int64)


def _spread_values(values: Any, most: int) -> Any:
    """Returns the values of an array or a list at the indices of `_spread`."""
    index = _spread(len(values), most)
    return values[index] if isinstance(values, np.ndarray) else [values[i] for i in index]


def _fewer_raw(raw: Mapping[str, tuple], most_rows: Mapping[str, int]) -> dict[str, tuple]:
    """Returns {split: (inputs, answers)} with at most `most_rows` of each split."""
    fewer: dict[str, tuple] = {}
    for split, columns in raw.items():
        fewer[split] = tuple(_spread_values(column, most_rows[split]) for column in columns)
    return fewer


class Classes(NamedTuple):
    """Holds what is known of labelled examples beside the rows.

    `raw` is what a classical baseline learns from: texts, or vectors [N, F], in the order of the
    rows.
    """

    labels: tuple[str, ...]
    # None for vectors.
    tokenizer: Any
    # P of vectors; 0 for texts.
    width: int
    # Split -> (texts or vectors, label_N).
    raw: Mapping[str, tuple[Any, np.ndarray]]

    def save(self, workdir: pathlib.Path) -> None:
        """Writes the tokenizer, if there is one, and the names of the labels."""
        if self.tokenizer is not None:
            self.tokenizer.save(workdir / "tokenizer")
        save_names(workdir / "labels.json", self.labels)

    def fewer(self, most_rows: Mapping[str, int]) -> "Classes":
        """Returns what is known of at most `most_rows` rows of each split."""
        return self._replace(raw=_fewer_raw(self.raw, most_rows))


class Pairs(NamedTuple):
    """Holds what is known of pairs of sentences beside the rows.

    `raw` has whole pairs: the held-out ones in the order of the rows, and all training pairs, also
    those that are too long for a row.
    """

    tokenizer: Any
    # Names of the languages.
    source: str
    target: str
    # Split -> (sources, targets).
    raw: Mapping[str, tuple[Sequence[str], Sequence[str]]]

    def save(self, workdir: pathlib.Path) -> None:
        """Writes the tokenizer."""
        self.tokenizer.save(workdir / "tokenizer")

    def fewer(self, most_rows: Mapping[str, int]) -> "Pairs":
        """Returns what is known of at most `most_rows` pairs of each split."""
        return self._replace(raw=_fewer_raw(self.raw, most_rows))


class Market(NamedTuple):
    """Holds what is known of baskets beside the rows: the whole lists of items, as item numbers."""

    # Names by number.
    items: tuple[str, ...]
    # The items of each training user.
    train: Sequence[np.ndarray]
    # The items of each held-out user that the model is given.
    shown: Sequence[np.ndarray]
    # The items of each held-out user that it must predict.
    hidden: Sequence[np.ndarray]
    # Split -> names.
    users: Mapping[str, Sequence[str]]

    def save(self, workdir: pathlib.Path) -> None:
        """Writes the names of the items."""
        save_names(workdir / "items.json", self.items)

    def fewer(self, most_rows: Mapping[str, int]) -> "Market":
        """Returns what is known of at most `most_rows` users of each split."""
        users = {
            split: _spread_values(names, most_rows[split]) for split, names in self.users.items()
        }
        return self._replace(
            train=_spread_values(self.train, most_rows["train"]),
            shown=_spread_values(self.shown, most_rows["heldout"]),
            hidden=_spread_values(self.hidden, most_rows["heldout"]),
            users=users,
        )


def save_names(path: pathlib.Path, names: Sequence[str]) -> None:
    """Writes names as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(names), ensure_ascii=False) + "\n", encoding="utf-8")


class Ragged(NamedTuple):
    """Sequences of unequal length end to end: sequence i is flat[starts[i] : starts[i + 1]]."""

    flat: np.ndarray  # [total, ...]
    # int64 [N + 1].
    starts: np.ndarray


def ragged(sequences: Sequence[np.ndarray]) -> Ragged:
    """Joins at least one sequence, of one dtype and width."""
    lengths = [len(sequence) for sequence in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Ragged(np.concatenate(sequences), starts)


def padded(sequences: Ragged, index_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (values [B, length, ...] of the sequences' type, valid [B, length]).

    Longer sequences are cut, shorter ones followed by 0.
    """
    start_B = sequences.starts[index_B]
    # Sequence i reaches to where the next one begins.
    length_B = sequences.starts[index_B + 1] - start_B
    position_S = np.arange(length)
    valid_BS = position_S[None] < length_B[:, None]
    # [B, S] places in the flat array; where there is none, place 0, which is masked below.
    flat_index_BS = np.where(valid_BS, start_B[:, None] + position_S[None], 0)
    return _masked(sequences.flat[flat_index_BS], valid_BS), valid_BS


def _masked(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Returns `values` with 0 where not `valid`, which has their leading dimensions."""
    if valid.all():
        return values
    # [B] or [B, S] -> [B, 1, ...] or [B, S, 1, ...], as many dimensions as the values have.
    shape = (*valid.shape, *[1] * (values.ndim - valid.ndim))
    return np.where(valid.reshape(shape), values, np.zeros((), values.dtype))


def one_segment(valid_BS: np.ndarray) -> Fields:
    """Returns segment and position of rows that hold one sequence each."""
    position_S = np.arange(valid_BS.shape[1], dtype=np.int32)
    return {
        "segment_BS": valid_BS.astype(np.int32),
        "position_BS": np.where(valid_BS, position_S[None], 0),
    }


def labelled(label_B: np.ndarray, domain_B: np.ndarray) -> Fields:
    """Returns label, domain and weight (1) of rows that have a label each."""
    return {
        "label_B": label_B.astype(np.int32),
        "domain_B": domain_B.astype(np.int32),
        "weight_B": np.ones(len(label_B), np.float32),
    }


def fingerprint(arguments: Sequence[Any], arrays: Iterable[np.ndarray]) -> str:
    """Returns the sha256 of options (as JSON) and of arrays with their shapes and types."""
    digest = hashlib.sha256(json.dumps(list(arguments)).encode())
    for array in arrays:
        # Shape and type too: the same bytes in another shape are other rows.
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
