"""The source `tfds`: the texts of a dataset of TensorFlow Datasets that is on this disk.

`tfds:NAME[/CONFIG][:SPLIT][#FIELD]`: SPLIT defaults to train (`train[:10%]` works), FIELD to
"text", or else to the only text feature there is. Nothing is downloaded (tfds_datasets.py).
"""

from collections.abc import Iterator

from moe_jax.data.documents import Document
from moe_jax.data.sources.characters import plain
from moe_jax.data.sources.contract import Source
from moe_jax.data.sources.files import split_field
from moe_jax.data.sources.tfds_datasets import (
    find_dataset,
    read_records,
    record_name,
    text_field,
)


def read(argument: str) -> Iterator[Document]:
    """Yields the text of each record of `NAME[/CONFIG][:SPLIT][#FIELD]` as one document."""
    dataset, field = split_field(argument, "")
    name, _, split = dataset.partition(":")
    split = split or "train"
    builder = find_dataset(name)
    field = text_field(builder.info.features, name, field)
    for number, record in enumerate(read_records(builder, name, split)):
        text = plain(record[field], record_name(name, split, number))
        yield Document(text, builder.info.name)


SOURCE = Source(
    argument_syntax=":NAME[/CONFIG][:SPLIT][#FIELD]",
    needs_argument=True,
    packed_by_run=False,
    read=read,
)
