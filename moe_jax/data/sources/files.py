"""Text, JSON lines and Parquet files, plain, .gz or .zst: all that a glob matches, in sorted order."""

import contextlib
import glob
import gzip
import io
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from moe_jax.data.documents import Document, cut
from moe_jax.errors import UserError

PIECE = 16_000  # characters of a document of a long text file
BLOCK = 1 << 20  # characters read at once


def read_text(argument: str, label: str) -> Iterator[Document]:
    """A file is one document; a file of more than two pieces is cut into documents of about 16,000 characters."""
    for path in matches("text", argument):
        with readable(path), open_text(path) as file:
            rest = ""
            while block := file.read(BLOCK):
                *pieces, rest = cut(rest + block, PIECE) if len(rest) + len(block) > 2 * PIECE else [rest + block]
                yield from (Document(piece, label or stem(path)) for piece in pieces)
            yield Document(rest, label or stem(path))


def read_jsonl(argument: str, label: str) -> Iterator[Document]:
    """A line is one document: a JSON object whose FIELD (default "text") is a string."""
    pattern, field = split_field(argument, "text")
    for path in matches("jsonl", pattern):
        with readable(path), open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(_field_of_line(line, field, f"{path}, line {number}"), label or stem(path))


def _field_of_line(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise UserError(f"{where} is JSON beyond what Python reads ({error}): mend or drop the line") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where} has no text in field {field!r} (it has: {there}); name the field after a #")
    try:
        record[field].encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} is no valid Unicode: half a surrogate pair at character {error.start}") from None
    return record[field]


def read_parquet(argument: str, label: str) -> Iterator[Document]:
    """A row is one document: column FIELD (default "text") of strings."""
    import pyarrow.parquet as pq

    pattern, field = split_field(argument, "text")
    for path in matches("parquet", pattern):
        with readable(path), seekable(path) as plain, pq.ParquetFile(plain) as file:
            schema = file.schema_arrow
            types = [schema.field(name).type for name in schema.names if name == field]
            if not types or not _is_text(types[0]):
                columns = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
                raise UserError(f"{path} has no text column {field!r} (it has: {columns}); name the column after a #")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                yield from (Document(text or "", label or stem(path)) for text in batch.column(0).to_pylist())


def _is_text(kind: Any) -> bool:
    """Strings, also as a dictionary of them (the categories of pandas)."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def matches(kind: str, pattern: str) -> list[str]:
    """The files of a glob (`**` goes into folders, `~` is the home folder), sorted; UserError if there is none."""
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
    """The file's name without its endings: data/laws.jsonl.gz -> laws."""
    return os.path.basename(path).split(".")[0] or os.path.basename(path)


def open_text(path: str) -> IO[str]:
    """A stream of the UTF-8 text of a plain, .gz or .zst file."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig")


def open_bytes(path: str) -> IO[bytes]:
    """A stream of what a plain, .gz or .zst file holds."""
    if path.endswith(".zst"):
        import pyarrow  # its reader tells a truncated file from a whole one; zstandard's does not

        return cast(IO[bytes], pyarrow.input_stream(path, compression="zstd"))
    return cast(IO[bytes], gzip.open(path)) if path.endswith(".gz") else open(path, "rb")


@contextlib.contextmanager
def seekable(path: str) -> Iterator[IO[bytes]]:
    """The same for who must jump about in it: a compressed file is unpacked on disk, not in memory."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_bytes(path))
        if path.endswith((".gz", ".zst")):
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, BLOCK)
            file = unpacked
        yield file


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns what goes wrong while `path` is read into one clear message."""
    import pyarrow

    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path} is not UTF-8 (byte {byte:#04x}): convert it, as in `iconv -f latin1 -t utf-8`"
        ) from None
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read, it may be damaged: {error}") from None
