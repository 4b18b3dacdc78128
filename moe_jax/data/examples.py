"""Examples in memory: labelled texts and vectors, pairs of sentences, baskets of items.

Each is one row; nothing is packed.

A row is built when it is asked for, from compact arrays. `Examples` does not know what is in a row:
it is generic over the NamedTuple of a task's batch, of which the kinds stand here. In all of them
padding has segment 0 (or weight 0), tokens 0 and position 0, and arrays are int32 where no other
type is named. Shapes: B rows, S places of a row, P width of a vector, L items of a basket, N
examples, R held-out rows.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.pack import interleaved

Fields = dict[str, np.ndarray]  # of a batch, all but row_B


class LabelledTokens(NamedTuple):
    """Texts, each beginning with the tokenizer's boundary, as the rows of a language model do."""

    tokens_BS: Any
    segment_BS: Any  # 1 where there is a token
    position_BS: Any
    domain_B: Any
    label_B: Any
    weight_B: Any  # float32; 0 = the row only fills up a batch
    row_B: Any


class LabelledVectors(NamedTuple):
    """Patches of an image or frames of a recording, standardised by the training part."""

    values_BSP: Any  # float32
    segment_BS: Any
    position_BS: Any
    domain_B: Any
    label_B: Any
    weight_B: Any  # float32
    row_B: Any


class SourceTarget(NamedTuple):
    """For an encoder and a decoder.

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
    """Boundary, source, boundary, target in one row. Only what the target predicts has a weight."""

    tokens_BS: Any
    targets_BS: Any
    segment_BS: Any
    position_BS: Any
    domain_BS: Any
    weight_BS: Any  # float32; 1 where a token of the target, or the boundary after it, is predicted
    prefix_BS: Any  # 1 on the source and both boundaries around it, which may all see each other
    row_B: Any


class Baskets(NamedTuple):
    """A user's items, and those to be predicted: all of them in training, others than the items
    when held out.
    """

    items_BL: Any
    weight_BL: Any  # float32; 0 = padding
    targets_BL: Any
    target_weight_BL: Any  # float32
    domain_B: Any
    row_B: Any


class Examples(NamedTuple):
    """Rows of both splits in memory; fulfils data/contract.py with one part."""

    spec: str  # what messages call it
    batch_type: type  # one of the NamedTuples above
    seq_len: int
    domains: tuple[str, ...]
    rows: Mapping[str, int]  # of each split
    fetch: Callable[
        [str, np.ndarray], Fields
    ]  # (split, index_B) -> the fields of a batch but row_B
    heldout_domain_R: np.ndarray
    fingerprint: str
    # what the task and its baselines know beside the rows: Classes, Pairs, Market; has
    # `save(workdir)`
    about: Any
    notes: tuple[str, ...]  # what was left out or cut, in sentences for the log of the run

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
        there_B: np.ndarray,
    ) -> Any:
        """The rows `index_B` as `batch_type`; all 0 where not `there_B` (`part_B` is 0 everywhere)."""
        fields = self.fetch(split, index_B)
        kept = {name: _kept(values, there_B) for name, values in fields.items()}
        return self.batch_type(**kept, row_B=row_B)

    def heldout_order(self) -> tuple[np.ndarray, np.ndarray]:
        order_R = interleaved(self.heldout_domain_R)
        return np.zeros_like(order_R), order_R

    def save(self, workdir: pathlib.Path) -> None:
        self.about.save(workdir)

    def fewer(self, train: int, heldout: int) -> "Examples":
        """At most so many rows of each split, spread evenly over it, and what the task and its
        baselines know of them.
        """
        most = {"train": train, "heldout": heldout}
        kept = {split: _spread(self.rows[split], number) for split, number in most.items()}
        return self._replace(
            rows={split: len(index) for split, index in kept.items()},
            fetch=lambda split, index_B: self.fetch(split, kept[split][index_B]),
            heldout_domain_R=self.heldout_domain_R[kept["heldout"]],
            about=self.about.fewer(most),
        )


def _spread(number: int, most: int) -> np.ndarray:
    """Indices of at most `most` of `number` rows, as far from each other as can be."""
    return np.linspace(0, number - 1, min(number, most)).round().astype(np.int64)


def _some(values: Any, most: int) -> Any:
    """The same choice of an array or a list."""
    index = _spread(len(values), most)
    return values[index] if isinstance(values, np.ndarray) else [values[i] for i in index]


class Classes(NamedTuple):
    """About labelled examples.

    `raw` is what a classical baseline learns from: texts, or vectors [N, F] in the order of the
    rows.
    """

    labels: tuple[str, ...]
    tokenizer: Any  # None for vectors
    width: int  # P of vectors; 0 for texts
    raw: Mapping[str, tuple[Any, np.ndarray]]  # split -> (texts or vectors, label_N)

    def save(self, workdir: pathlib.Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(workdir / "tokenizer")
        save_names(workdir / "labels.json", self.labels)

    def fewer(self, most: Mapping[str, int]) -> "Classes":
        return self._replace(
            raw={
                split: tuple(_some(x, most[split]) for x in pair)
                for split, pair in self.raw.items()
            }
        )


class Pairs(NamedTuple):
    """About a translation.

    `raw` has whole pairs: those held out in the order of the rows, and all for training, also the
    too long.
    """

    tokenizer: Any
    source: str  # names of the languages
    target: str
    raw: Mapping[str, tuple[Sequence[str], Sequence[str]]]  # split -> (sources, targets)

    def save(self, workdir: pathlib.Path) -> None:
        self.tokenizer.save(workdir / "tokenizer")

    def fewer(self, most: Mapping[str, int]) -> "Pairs":
        return self._replace(
            raw={
                split: tuple(_some(x, most[split]) for x in pair)
                for split, pair in self.raw.items()
            }
        )


class Market(NamedTuple):
    """About baskets. `raw` holds whole lists; a held-out user's are in `seen` and `wanted`."""

    items: tuple[str, ...]
    train: Sequence[np.ndarray]  # of each training user, its items
    seen: Sequence[np.ndarray]  # of each held-out user, the items that are shown
    wanted: Sequence[np.ndarray]  # and those that are to be found
    users: Mapping[str, Sequence[str]]  # split -> names

    def save(self, workdir: pathlib.Path) -> None:
        save_names(workdir / "items.json", self.items)

    def fewer(self, most: Mapping[str, int]) -> "Market":
        lists = {name: _some(getattr(self, name), most["heldout"]) for name in ("seen", "wanted")}
        users = {split: _some(names, most[split]) for split, names in self.users.items()}
        return self._replace(train=_some(self.train, most["train"]), users=users, **lists)


def save_names(path: pathlib.Path, names: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(names), ensure_ascii=False) + "\n", encoding="utf-8")


def _kept(values: np.ndarray, there_B: np.ndarray) -> np.ndarray:
    shape = (-1, *[1] * (values.ndim - 1))
    return (
        values
        if there_B.all()
        else np.where(there_B.reshape(shape), values, np.zeros((), values.dtype))
    )


class Ragged(NamedTuple):
    """Sequences of unequal length end to end."""

    flat: np.ndarray  # [total, ...]
    starts: np.ndarray  # int64 [N + 1]


def ragged(sequences: Sequence[np.ndarray]) -> Ragged:
    """Joins at least one sequence, of one dtype and width."""
    lengths = [len(sequence) for sequence in sequences]
    return Ragged(
        np.concatenate(sequences), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    )


def padded(sequences: Ragged, index_B: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(values [B, length, ...] of the sequences' type, there [B, length]); longer sequences are
    cut, shorter ones followed by 0.
    """
    start_B = sequences.starts[index_B]
    place_S = np.arange(length)
    there_BS = place_S[None] < (sequences.starts[index_B + 1] - start_B)[:, None]
    values = sequences.flat[np.where(there_BS, start_B[:, None] + place_S[None], 0)]
    return _masked(values, there_BS), there_BS


def _masked(values: np.ndarray, there_BS: np.ndarray) -> np.ndarray:
    return np.where(
        there_BS.reshape(*there_BS.shape, *[1] * (values.ndim - 2)),
        values,
        np.zeros((), values.dtype),
    )


def places(there_BS: np.ndarray) -> Fields:
    """Segment and position of rows that hold one sequence each."""
    place_S = np.arange(there_BS.shape[1], dtype=np.int32)
    return {
        "segment_BS": there_BS.astype(np.int32),
        "position_BS": np.where(there_BS, place_S[None], 0),
    }


def labelled(label_B: np.ndarray, domain_B: np.ndarray) -> Fields:
    """Fields of rows that have a label each."""
    label_B, domain_B = label_B.astype(np.int32), domain_B.astype(np.int32)
    return {"label_B": label_B, "domain_B": domain_B, "weight_B": np.ones(len(label_B), np.float32)}


def fingerprint(arguments: Sequence[Any], arrays: Iterable[np.ndarray]) -> str:
    """sha256 of options (as JSON) and of arrays with their shapes and types."""
    digest = hashlib.sha256(json.dumps(list(arguments)).encode())
    for array in arrays:
        digest.update(
            f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
        )
    return digest.hexdigest()
