"""Reads labelled examples, pairs and ratings of a prepared TFDS data set, without TensorFlow.

A set is named `tfds:NAME[/CONFIG][:SPLIT][#FIELD]`. SPLIT chooses training examples (default train,
`train[:10%]` works). The split test is held out, or validation where test is absent or keeps its
labels secret (-1, as GLUE does).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moe_jax.data.records import labels
from moe_jax.data.sources import tfds_datasets
from moe_jax.data.sources.characters import plain
from moe_jax.data.sources.files import split_field
from moe_jax.errors import UserError

PREFIX = "tfds:"


class Record(NamedTuple):
    """One record of a set."""

    # "train" or "heldout".
    split: str
    # The record's name in messages.
    where: str
    fields: Mapping[str, Any]

    def text(self, field: str) -> str:
        """Returns the text of a feature. Raises UserError for one that is no UTF-8."""
        return plain(self.fields[field], self.where)


class Stored(NamedTuple):
    """A TFDS data set on this disk."""

    name: str
    # What follows the #, "" if nothing does.
    field: str
    # Of the training examples.
    split: str
    builder: Any

    @property
    def features(self) -> Mapping[str, Any]:
        """Returns the features of a record by name."""
        return self.builder.info.features

    def records(self, part: str, split: str) -> Iterator[Record]:
        """Yields the records of a split of the set as records of `part`, "train" or "heldout".

        Raises UserError for a split that is unknown or empty, and for damage.
        """
        empty = True
        for number, fields in enumerate(tfds_datasets.read_records(self.builder, self.name, split)):
            empty = False
            yield Record(part, tfds_datasets.record_name(self.name, split, number), fields)
        if empty:
            raise UserError(f"dataset {self.name}, split {split!r} has no records")

    def both(self, label: str) -> Iterator[Record]:
        """Yields the records of both parts. Raises UserError where nothing is held out.

        `label`: the feature that has the class, "" if none has.
        """
        yield from self.records("train", self.split)
        splits = self.builder.info.splits
        # The first that has labels: GLUE keeps those of its test part secret.
        for name in ("test", "validation"):
            if name in splits and (not label or self._has_labels(name, label)):
                yield from self.records("heldout", name)
                return
        raise UserError(
            f"dataset {self.name} has neither a split test nor validation with labels (it has: "
            f"{', '.join(splits)})"
        )

    def _has_labels(self, split: str, label: str) -> bool:
        """Returns whether any record of a split has its label."""
        return any(record.fields[label] != labels.NONE for record in self.records("heldout", split))

    def only(self, kind: type, what: str) -> str:
        """Returns the name of the one feature of a kind. Raises UserError if there is none or
        several.
        """
        names = [name for name in sorted(self.features) if isinstance(self.features[name], kind)]
        if len(names) != 1:
            raise UserError(
                f"dataset {self.name} has {len(names)} features that are {what} "
                f"({', '.join(names)}), not one"
            )
        return names[0]


def open_stored(spec: str) -> Stored:
    """Opens the set that `tfds:...` names. Raises UserError if it is not on this disk."""
    dataset, field = split_field(spec.removeprefix(PREFIX), "")
    name, _, split = dataset.partition(":")
    return Stored(name, field, split or "train", tfds_datasets.find_dataset(name))
