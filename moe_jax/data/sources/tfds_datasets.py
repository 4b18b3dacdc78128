"""Reads datasets of TensorFlow Datasets that are already on this disk: their records, in order.

TensorFlow is not needed and nothing is downloaded. The folder of the datasets is $TFDS_DATA_DIR, or
~/tensorflow_datasets.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_jax.errors import UserError


def record_name(name: str, split: str, number: int) -> str:
    """Returns the name of a record in messages."""
    return f"dataset {name}, split {split}, record {number}"


def find_dataset(name: str) -> Any:
    """Returns the builder of a dataset on this disk.

    Raises UserError if it is not there, is damaged, or needs TensorFlow to be read.
    """
    from moe_jax.data.tfds_import import tfds

    folder = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
        file_format = builder.info.file_format.value
    except tfds.core.DatasetNotFoundError:
        raise UserError(
            f"dataset {name!r} is not in {folder}, and nothing is downloaded here: prepare it "
            "where there is a network "
            "(tfds.builder(NAME, file_format='array_record').download_and_prepare()) and set "
            "TFDS_DATA_DIR"
        ) from None
    # Its JSON files are read by several parsers, each of which has errors of its own.
    except Exception as error:
        raise UserError(
            f"dataset {name!r} in {folder} cannot be opened, its dataset_info.json or "
            f"features.json may be damaged ({first_line(error)}): copy or prepare it again"
        ) from None
    # The one format that is read without TensorFlow.
    if file_format != "array_record":
        raise UserError(
            f"dataset {name} is stored as {file_format}, which needs TensorFlow: convert it with "
            "`tfds convert_format --out_file_format=array_record`"
        )
    return builder


def text_field(features: Mapping[str, Any], name: str, field: str) -> str:
    """Returns the feature to read: `field`, or "text", or the only text feature.

    Raises UserError if there is no such feature.
    """
    from moe_jax.data.tfds_import import tfds

    texts = [key for key in sorted(features) if isinstance(features[key], tfds.features.Text)]
    if not field and "text" in texts:
        return "text"
    if not field and len(texts) == 1:
        return texts[0]
    if field not in texts:
        missing = f"no text feature {field!r}" if field else "no single text feature"
        raise UserError(
            f"dataset {name} has {missing} (text features: {', '.join(texts)}); name one after a #"
        )
    return field


def read_records(builder: Any, name: str, split: str) -> Iterator[Mapping[str, Any]]:
    """Yields the decoded records of a split in their order.

    Raises UserError for an unknown split, for damage, for what only TensorFlow decodes.
    """
    records = open_split(builder, name, split)
    with intact(f"dataset {name}, split {split}"):
        yield from records


def open_split(builder: Any, name: str, split: str) -> Sequence[Mapping[str, Any]]:
    """Returns the records of a split, each decoded when it is taken.

    Raises UserError for an unknown split, and for damage.
    """
    try:
        return builder.as_data_source(split=split)
    # TFDS says so of a split that it does not know, and of a slice that it cannot read.
    except ValueError as error:
        raise UserError(f"dataset {name}, split {split!r}: {first_line(error)}") from None
    except (RuntimeError, OSError) as error:
        raise damage_error(f"dataset {name}, split {split}", error) from None


@contextlib.contextmanager
def intact(name: str) -> Iterator[None]:
    """Turns what goes wrong while records of ArrayRecord files are read into a UserError.

    `name`: of the records in messages.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{name} has features that only TensorFlow decodes ({first_line(error)})"
        ) from None
    # A UserError is a ValueError, and says already what is wrong.
    except UserError:
        raise
    # Each file, chunk and record of ArrayRecord has a checksum, which is compared as it is read.
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        raise damage_error(name, error) from None


def damage_error(name: str, error: Exception) -> UserError:
    """Returns the error for damaged records, which are called `name`."""
    return UserError(
        f"{name} cannot be read, it may be damaged ({first_line(error)}): copy it again, or "
        "prepare it again"
    )


def first_line(error: Exception) -> str:
    """Returns the beginning of what a library says, which may go on for pages."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
