"""The source `hf`: data sets of Hugging Face (extra `eval`), streamed, or on this disk.

`hf:NAME[,CONFIG][:SPLIT][#FIELD]`: SPLIT defaults to train, FIELD to "text". NAME is a data set of
the Hub, which is streamed and never stored, or a folder: one that `save_to_disk` wrote, or one of
files that `datasets` reads.
"""

import os
from collections.abc import Iterator
from typing import Any

from moe_jax.data.documents import Document
from moe_jax.data.sources.characters import plain
from moe_jax.data.sources.contract import Source
from moe_jax.data.sources.files import split_field
from moe_jax.errors import UserError


def read(argument: str) -> Iterator[Document]:
    """Yields the text of each record as one document, in the order of the data set."""
    place, field = split_field(argument, "text")
    place, _, split = place.partition(":")
    name, _, configuration = place.partition(",")
    split = split or "train"
    where = f"data set {name}, split {split}"
    domain = os.path.basename(os.path.normpath(name)).split(".")[0] or "hf"
    for number, record in enumerate(_records(name, configuration, split, where)):
        text = record.get(field)
        if not isinstance(text, str | None) or field not in record:
            raise UserError(
                f"{where}, record {number} has no text in field {field!r} (it has: "
                f"{', '.join(record)}); name the field after a #"
            )
        yield Document(plain(text or "", f"{where}, record {number}"), domain)


def _records(name: str, configuration: str, split: str, where: str) -> Iterator[dict[str, Any]]:
    """Yields records. UserError, in one line, for whatever `datasets` says."""
    import datasets

    try:
        if os.path.isfile(os.path.join(name, "dataset_info.json")) or os.path.isfile(
            os.path.join(name, "dataset_dict.json")
        ):
            found = datasets.load_from_disk(name)
            if isinstance(found, datasets.DatasetDict):
                found = found[split]
        else:
            found = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        yield from found
    # It has errors of its own, of fsspec, of pyarrow and of the network.
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{where} cannot be read: {type(error).__name__}: {said}") from None


SOURCE = Source(
    argument_syntax=":NAME[,CONFIG][:SPLIT][#FIELD]",
    needs_argument=True,
    packed_by_run=False,
    read=read,
    extra_modules=("datasets",),
)
