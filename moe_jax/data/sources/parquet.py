"""The source `parquet`: tables in Parquet files, a document in each row."""

from collections.abc import Iterator
from typing import Any

from moe_jax.data.documents import Document
from moe_jax.data.sources.characters import plain, readable
from moe_jax.data.sources.contract import Source
from moe_jax.data.sources.files import matches, seekable, split_field, stem
from moe_jax.errors import UserError

# Few, because a document may be long and the texts of all of them are in memory.
ROWS_AT_ONCE = 256


def read(argument: str) -> Iterator[Document]:
    """Yields each row as one document: column FIELD (default "text"), strings or null."""
    import pyarrow.parquet as pq

    pattern, field = split_field(argument, "text")
    for path in matches("parquet", pattern):
        domain = stem(path)
        with readable(path), seekable(path) as unpacked, pq.ParquetFile(unpacked) as file:
            _check_column(file.schema_arrow, field, path)
            number = 0
            # One column, a few rows at a time.
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield Document(plain(text, f"{path}, row {number}"), domain)


def _check_column(schema: Any, field: str, path: str) -> None:
    """Raises UserError if the schema of a Parquet file has not one text column `field`."""
    types = [column.type for column in schema if column.name == field]
    if len(types) > 1:
        raise UserError(
            f"{path} has column {field!r} more than once, so which is its text is not "
            "known: drop all but one"
        )
    if not types or not _is_text(types[0]):
        columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
        raise UserError(
            f"{path} has no text column {field!r} (it has: {columns}); name the column after a #"
        )


def _is_text(column_type: Any) -> bool:
    """Returns whether a column has strings, also as a dictionary of them (categories of pandas)."""
    import pyarrow as pa

    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    return pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


SOURCE = Source(
    argument_syntax=":GLOB[#FIELD]", needs_argument=True, packed_by_run=False, read=read
)
