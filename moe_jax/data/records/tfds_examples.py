"""Labelled examples, pairs and ratings of a prepared TFDS data set:

`tfds:NAME[/CONFIG][:SPLIT][#FIELD]`, without TensorFlow.

SPLIT chooses training examples (default train, `train[:10%]` works). Held out is the split test, or
validation where test is absent or keeps its labels secret (-1, as GLUE does).
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

    split: str  # "train" or "heldout"
    where: str  # what messages call it
    fields: Mapping[str, Any]

    def text(self, field: str) -> str:
        """The text of a feature; UserError for one that is no UTF-8."""
        return plain(self.fields[field], self.where)


class Stored(NamedTuple):
    name: str
    field: str  # what follows the #, "" if nothing does
    split: str  # of the training examples
    builder: Any

    @property
    def features(self) -> Mapping[str, Any]:
        return self.builder.info.features

    def records(self, part: str, split: str) -> Iterator[Record]:
        """The records of a split of the set, as those of `part`; UserError for a split that is
        unknown or empty, and for damage.
        """
        number = -1
        for number, fields in enumerate(tfds_datasets.records(self.builder, self.name, split)):
            yield Record(part, tfds_datasets.where(self.name, split, number), fields)
        if number < 0:
            raise UserError(f"dataset {self.name}, split {split!r} has no records")

    def both(self, label: str) -> Iterator[Record]:
        """The records of both parts; UserError where nothing is held out.

        `label`: the feature that has the class, "" if none has.
        """
        yield from self.records("train", self.split)
        for name in ("test", "validation"):
            if name in self.builder.info.splits and (not label or self._has_labels(name, label)):
                yield from self.records("heldout", name)
                return
        there = ", ".join(self.builder.info.splits)
        raise UserError(
            f"dataset {self.name} has neither a split test nor validation with labels (it has: "
            f"{there})"
        )

    def _has_labels(self, split: str, label: str) -> bool:
        return any(record.fields[label] != labels.NONE for record in self.records("heldout", split))

    def only(self, kind: type, what: str) -> str:
        """The one feature of a kind; UserError if there is none or several."""
        found = [key for key in sorted(self.features) if isinstance(self.features[key], kind)]
        if len(found) != 1:
            raise UserError(
                f"dataset {self.name} has {len(found)} features that are {what} "
                f"({', '.join(found)}), not one"
            )
        return found[0]


def open_stored(spec: str) -> Stored:
    """What `tfds:...` names; UserError if it is not on this disk."""
    place, field = split_field(spec.removeprefix(PREFIX), "")
    name, _, split = place.partition(":")
    return Stored(name, field, split or "train", tfds_datasets.find(name))
