"""The sources `text`, `jsonl` and `parquet`: files that a glob matches, plain or packed, sorted."""

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from moe_jax.data.documents import Document, cut
from moe_jax.data.sources import packed
from moe_jax.data.sources.characters import open_text, plain, readable
from moe_jax.errors import UserError

PIECE = 16_000  # characters of a document of a long text file
BLOCK = 1 << 20  # characters read at once


def read_text(argument: str, label: str) -> Iterator[Document]:
    """Yields a file as one document, or as documents of about PIECE characters if it is long.

    Long is a file of more than two pieces. It is read and cut block by block.
    """
    for path in matches("text", argument):
        domain = label or stem(path)
        with readable(path), open_text(path) as file:
            rest = ""  # what is read and not yet a document
            while block := file.read(BLOCK):
                rest += block
                if len(rest) > 2 * PIECE:
                    *pieces, rest = cut(rest, PIECE)
                    for piece in pieces:
                        yield Document(plain(piece, path), domain)
            yield Document(plain(rest, path), domain)


def read_jsonl(argument: str, label: str) -> Iterator[Document]:
    """Yields each line as one document.

    A line is a JSON object whose FIELD (default "text") is a string, or null for no text.
    """
    pattern, field = split_field(argument, "text")
    for path in matches("jsonl", pattern):
        domain = label or stem(path)
        with readable(path), open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(_text_of_line(line, field, f"{path}, line {number}"), domain)


def _text_of_line(line: str, field: str, where: str) -> str:
    """Returns the text in a field of the JSON object of a line; UserError if there is none."""
    record = _json(line, where)
    if not isinstance(record, dict) or not isinstance(record.get(field, 0), str | None):
        content = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f"{where} has no text in field {field!r} (it has: {content}); name the field after a #"
        )
    # Python takes the last of equal keys. They are looked for only where the name stands twice in
    # the line, which is rare.
    if line.count(f'"{field}"') > 1 and _count_key(line, field) > 1:
        raise UserError(
            f"{where} has field {field!r} more than once, so which is its text is not known: drop "
            "all but one"
        )
    return plain(record[field], where)


def _json(line: str, where: str) -> Any:
    """Returns the JSON value of a line; UserError if it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    # A number of thousands of digits, or brackets a thousand deep.
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is JSON beyond what Python reads ({error}): mend or drop the line"
        ) from None


def _count_key(line: str, key: str) -> int:
    """Returns how often the JSON object of a line has a key."""
    pairs: list[tuple[str, Any]] = json.loads(line, object_pairs_hook=list)
    return sum(name == key for name, _ in pairs)


def read_parquet(argument: str, label: str) -> Iterator[Document]:
    """Yields each row as one document: column FIELD (default "text"), strings or null."""
    import pyarrow.parquet as pq

    pattern, field = split_field(argument, "text")
    for path in matches("parquet", pattern):
        domain = label or stem(path)
        with readable(path), seekable(path) as unpacked, pq.ParquetFile(unpacked) as file:
            _check_column(file.schema_arrow, field, path)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield Document(plain(text, f"{path}, row {number}"), domain)


def _check_column(schema: Any, field: str, path: str) -> None:
    """UserError if the schema of a Parquet file has not one text column `field`."""
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


def matches(kind: str, pattern: str) -> list[str]:
    """Returns the files that a glob matches, sorted; UserError if there is none.

    `**` goes into folders, `~` is the home folder.
    """
    matched = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(path for path in matched if os.path.isfile(path))
    if not paths:
        raise UserError(f"source {kind}:{pattern} matches no file (looked from {os.getcwd()})")
    return paths


def split_field(argument: str, default: str) -> tuple[str, str]:
    """Returns the two parts of `GLOB#FIELD`, or the whole and the default where no # is."""
    pattern, _, field = argument.rpartition("#")
    return (pattern, field) if pattern else (argument, default)


def stem(path: str) -> str:
    """Returns the file's name without its endings: data/laws.jsonl.gz -> laws.

    Bytes of it that are no UTF-8 become U+FFFD.
    """
    name = os.fsencode(os.path.basename(path)).decode("utf-8", "replace")
    return name.split(".")[0] or name


@contextlib.contextmanager
def seekable(path: str) -> Iterator[IO[bytes]]:
    """Opens the content of a file for a reader that seeks in it.

    A packed file is unpacked on disk, not in memory.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(packed.open_bytes(path))
        if packed.packing(path):
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, BLOCK)
            file = unpacked
        yield file
