"""The source `jsonl`: files of JSON lines, a document in each line."""

import json
from collections.abc import Iterator
from typing import Any

from moe_jax.data.documents import Document
from moe_jax.data.sources.characters import open_text, plain, readable
from moe_jax.data.sources.contract import Source
from moe_jax.data.sources.files import matches, split_field, stem
from moe_jax.errors import UserError


def read(argument: str) -> Iterator[Document]:
    """Yields each line as one document; lines of white space are skipped.

    A line is a JSON object whose FIELD (default "text") is a string, or null for no text.
    """
    pattern, field = split_field(argument, "text")
    for path in matches("jsonl", pattern):
        domain = stem(path)
        with readable(path), open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(_text_of_line(line, field, f"{path}, line {number}"), domain)


def _text_of_line(line: str, field: str, where: str) -> str:
    """Returns the text in a field of the JSON object of a line.

    Raises UserError if there is none.
    """
    record = _json(line, where)
    # An absent field counts as a number, which is no text either.
    has_text = isinstance(record, dict) and isinstance(record.get(field, 0), str | None)
    if not has_text:
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
    """Returns the JSON value of a line. Raises UserError if it is none."""
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


SOURCE = Source(
    argument_syntax=":GLOB[#FIELD]", needs_argument=True, packed_by_run=False, read=read
)
