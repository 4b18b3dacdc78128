"""Text, JSON lines and Parquet files, plain or packed: all that a glob matches, in sorted order."""

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
    """A file is one document; a file of more than two pieces is cut into documents of about 16,000
    characters.
    """
    for path in matches("text", argument):
        with readable(path), open_text(path) as file:
            rest = ""
            while block := file.read(BLOCK):
                *pieces, rest = (
                    cut(rest + block, PIECE)
                    if len(rest) + len(block) > 2 * PIECE
                    else [rest + block]
                )
                yield from (Document(plain(piece, path), label or stem(path)) for piece in pieces)
            yield Document(plain(rest, path), label or stem(path))


def read_jsonl(argument: str, label: str) -> Iterator[Document]:
    """A line is one document: a JSON object whose FIELD (default "text") is a string, or null for
    none.
    """
    pattern, field = split_field(argument, "text")
    for path in matches("jsonl", pattern):
        with readable(path), open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(
                        _field_of_line(line, field, f"{path}, line {number}"), label or stem(path)
                    )


def _field_of_line(line: str, field: str, where: str) -> str:
    record = _json(line, where)
    if not isinstance(record, dict) or not isinstance(record.get(field, 0), str | None):
        there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f"{where} has no text in field {field!r} (it has: {there}); name the field after a #"
        )
    # Python takes the last of equal keys. They are looked for only where the name stands twice in
    # the line, which is rare.
    if line.count(f'"{field}"') > 1 and _times(line, field) > 1:
        raise UserError(
            f"{where} has field {field!r} more than once, so which is its text is not known: drop "
            "all but one"
        )
    return plain(record[field], where)


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, brackets a thousand deep
        raise UserError(
            f"{where} is JSON beyond what Python reads ({error}): mend or drop the line"
        ) from None


def _times(line: str, field: str) -> int:
    """How often the object of a line has a key."""
    pairs: list[tuple[str, Any]] = json.loads(line, object_pairs_hook=list)
    return sum(key == field for key, _ in pairs)


def read_parquet(argument: str, label: str) -> Iterator[Document]:
    """A row is one document: column FIELD (default "text") of strings, or null for none."""
    import pyarrow.parquet as pq

    pattern, field = split_field(argument, "text")
    for path in matches("parquet", pattern):
        with readable(path), seekable(path) as unpacked, pq.ParquetFile(unpacked) as file:
            schema = file.schema_arrow
            types = [column.type for column in schema if column.name == field]
            if len(types) > 1:
                raise UserError(
                    f"{path} has column {field!r} more than once, so which is its text is not "
                    "known: drop all but one"
                )
            if not types or not _is_text(types[0]):
                columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
                raise UserError(
                    f"{path} has no text column {field!r} (it has: {columns}); name the column "
                    "after a #"
                )
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield Document(plain(text, f"{path}, row {row}"), label or stem(path))


def _is_text(kind: Any) -> bool:
    """Strings, also as a dictionary of them (the categories of pandas)."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def matches(kind: str, pattern: str) -> list[str]:
    """The files of a glob (`**` goes into folders, `~` is the home folder), sorted; UserError if
    there is none.
    """
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(path for path in found if os.path.isfile(path))
    if not paths:
        raise UserError(f"source {kind}:{pattern} matches no file (looked from {os.getcwd()})")
    return paths


def split_field(argument: str, default: str) -> tuple[str, str]:
    """`GLOB#FIELD` into its two parts."""
    pattern, _, field = argument.rpartition("#")
    return (pattern, field) if pattern else (argument, default)


def stem(path: str) -> str:
    """The file's name without its endings: data/laws.jsonl.gz -> laws.

    Bytes of it that are no UTF-8 become U+FFFD.
    """
    name = os.fsencode(os.path.basename(path)).decode("utf-8", "replace")
    return name.split(".")[0] or name


@contextlib.contextmanager
def seekable(path: str) -> Iterator[IO[bytes]]:
    """What a file holds, for who must jump about in it: a packed file is unpacked on disk, not in
    memory.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(packed.open_bytes(path))
        if packed.packing(path):
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, BLOCK)
            file = unpacked
        yield file
