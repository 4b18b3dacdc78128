"""Text datasets of TensorFlow Datasets that are already on this disk, read without TensorFlow and without a network.

`tfds:NAME[/CONFIG][:SPLIT][#FIELD]`: SPLIT defaults to train (`train[:10%]` works), FIELD to "text", or else to the
only text feature there is. The folder is $TFDS_DATA_DIR, or ~/tensorflow_datasets.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_jax.data.documents import Document
from moe_jax.data.sources.files import split_field
from moe_jax.errors import UserError


def read(argument: str, label: str) -> Iterator[Document]:
    place, field = split_field(argument, "")
    name, _, split = place.partition(":")
    builder = find(name)
    field = text_field(builder.info.features, name, field)
    records = _records(builder, name, split or "train")
    try:
        for record in records:
            yield Document(record[field].decode("utf-8"), label or builder.info.name)
    except ImportError as error:
        raise UserError(f"dataset {name} has features that only TensorFlow decodes ({error})") from None


def find(name: str) -> Any:
    """The builder of a dataset on this disk; UserError if it is not there or needs TensorFlow to be read."""
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"dataset {name!r} is not in {folder}, and nothing is downloaded here: prepare it where there is a network "
            "(tfds.builder(NAME, file_format='array_record').download_and_prepare()) and set TFDS_DATA_DIR"
        ) from None
    found = builder.info.file_format.value
    if found != "array_record":
        raise UserError(
            f"dataset {name} is stored as {found}, which needs TensorFlow: convert it with "
            "`tfds convert_format --out_file_format=array_record`"
        )
    return builder


def text_field(features: Mapping[str, Any], name: str, field: str) -> str:
    """The feature to read: `field`, or "text", or the only text feature; UserError if that names none."""
    import tensorflow_datasets as tfds

    texts = [key for key in sorted(features) if isinstance(features[key], tfds.features.Text)]
    if not field and ("text" in texts or len(texts) == 1):
        return "text" if "text" in texts else texts[0]
    if field not in texts:
        wanted = f"no text feature {field!r}" if field else "no single text feature"
        raise UserError(f"dataset {name} has {wanted} (text features: {', '.join(texts)}); name one after a #")
    return field


def _records(builder: Any, name: str, split: str) -> Sequence[Any]:
    try:
        return builder.as_data_source(split=split)
    except ValueError as error:
        raise UserError(f"dataset {name}, split {split!r}: {str(error).splitlines()[0]}") from None
