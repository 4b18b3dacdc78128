"""Writes converted files, packed with gzip, and a record of where each comes from."""

import gzip
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

from moe_jax.data.publishers.given import Source
from moe_jax.errors import UserError

# The day of the rules of conversion. It changes when what comes out changes.
RULES = "2026-11-28"


def tsv(rows: Iterable[Sequence[str]]) -> bytes:
    """Returns lines of cells with tabs between. What would end a cell or a line becomes a space."""
    lines: list[str] = []
    for row in rows:
        cells = [re.sub(r"[\t\r\n]", " ", cell) for cell in row]
        lines.append("\t".join(cells) + "\n")
    return "".join(lines).encode("utf-8")


def write(path: pathlib.Path, content: bytes, dataset: str, sources: Sequence[Source]) -> bool:
    """Writes `content` to `path`, packed if its name ends with .gz, and PATH.source.json beside it.

    Returns False if the file is there already with this content: it is left as it is. Raises
    UserError if it is there with another content, so that nothing is overwritten, or if it cannot
    be written.
    """
    try:
        if path.exists():
            if _content(path) != content:
                raise UserError(
                    f"{path} is there already and holds something else: move it, or choose "
                    "another --out"
                )
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        # mtime=0: the same content gives the same bytes.
        is_packed = path.suffix == ".gz"
        _replace(path, gzip.compress(content, 6, mtime=0) if is_packed else content)
        record = {
            "dataset": dataset,
            "rules": RULES,
            "sha256_unpacked": hashlib.sha256(content).hexdigest(),
            "sources": [source._asdict() for source in sources],
        }
        record_path = path.with_name(path.name + ".source.json")
        _replace(record_path, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): choose another --out"
        ) from None
    return True


def _content(path: pathlib.Path) -> bytes | None:
    """Returns the content of a file, None if it is damaged."""
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError):
        return None


def _replace(path: pathlib.Path, data: bytes) -> None:
    """Writes a file in one step, so that a killed process leaves no half of it under its name."""
    # The number of the process: two that convert at once do not share a file.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
