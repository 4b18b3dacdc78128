"""Labelled examples, pairs and ratings of a prepared TFDS data set: `tfds:NAME[/CONFIG][:SPLIT][#FIELD]`, without TensorFlow.

SPLIT chooses training examples (default train, `train[:10%]` works). Held out is the split test, or validation where test is absent or
keeps its labels secret (-1, as GLUE does).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_jax.data.sources import tfds_datasets
from moe_jax.data.sources.files import split_field
from moe_jax.errors import UserError

PREFIX = "tfds:"


class Stored(NamedTuple):
    name: str
    field: str  # what follows the #, "" if nothing does
    split: str  # of the training examples
    builder: Any

    @property
    def features(self) -> Mapping[str, Any]:
        return self.builder.info.features

    def records(self, split: str) -> Sequence[dict[str, Any]]:
        """The records of a split, decoded when they are taken; UserError for an unknown split or what only TensorFlow decodes."""
        try:
            source = self.builder.as_data_source(split=split)
            source[0]
        except (ValueError, IndexError) as error:
            raise UserError(f"dataset {self.name}, split {split!r}: {str(error).splitlines()[0]}") from None
        except ImportError as error:
            message = f"dataset {self.name} has features that only TensorFlow decodes ({error})"
            raise UserError(message) from None
        return source

    def splits(self, label: str) -> Iterator[tuple[str, Sequence[dict[str, Any]]]]:
        """("train", records), ("heldout", records); UserError where nothing is held out."""
        yield "train", self.records(self.split)
        for name in ("test", "validation"):
            if name in self.builder.info.splits:
                records = self.records(name)
                if not label or records[0][label] >= 0:
                    yield "heldout", records
                    return
        there = ", ".join(self.builder.info.splits)
        raise UserError(f"dataset {self.name} has neither a split test nor validation with labels (it has: {there})")

    def only(self, kind: type, what: str) -> str:
        """The one feature of a kind; UserError if there is none or several."""
        found = [key for key in sorted(self.features) if isinstance(self.features[key], kind)]
        if len(found) != 1:
            raise UserError(
                f"dataset {self.name} has {len(found)} features that are {what} ({', '.join(found)}), not one"
            )
        return found[0]


def open_stored(spec: str) -> Stored:
    """What `tfds:...` names; UserError if it is not on this disk."""
    place, field = split_field(spec.removeprefix(PREFIX), "")
    name, _, split = place.partition(":")
    return Stored(name, field, split or "train", tfds_datasets.find(name))
