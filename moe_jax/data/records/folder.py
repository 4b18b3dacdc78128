"""Finds the files of a data set below `data.folder`, and reads tables of text."""

import os
import pathlib
import shlex
from collections.abc import Iterator

from moe_jax.data.sources.characters import open_text, plain, readable
from moe_jax.errors import UserError


def find(folder: str, kind: str, name: str, dataset: str) -> pathlib.Path:
    """Returns folder/name or folder/kind/name.

    Raises UserError, with the command that makes the file, if there is neither.
    """
    base = pathlib.Path(os.path.expanduser(folder))
    for path in (base / name, base / kind / name):
        if path.exists():
            return path
    command = f"python -m moe_jax data {dataset} --from FILE|DIR --out {shlex.quote(folder)}"
    raise UserError(
        f"data.folder = {folder!r} has neither {name} nor {kind}/{name}: `{command}` makes it from "
        "what its publisher distributes (`python -m moe_jax data` says where that is)"
    )


def read_tsv(path: pathlib.Path, columns: int, header: bool) -> Iterator[list[str]]:
    """Yields the cells of each line of a file with tabs between `columns` columns.

    With `header` the first line is left out. Raises UserError for a line with another number of
    columns.
    """
    with readable(str(path)), open_text(str(path)) as file:
        for number, line in enumerate(file, 1):
            cells = plain(line, f"{path}, line {number}").rstrip("\n").split("\t")
            if len(cells) != columns:
                raise UserError(
                    f"{path}, line {number} has {len(cells)} columns instead of {columns} (between "
                    "tabs)"
                )
            if number > 1 or not header:
                yield cells


def unknown(kind: str, name: str, known: list[str]) -> UserError:
    """Returns the error for a data set that does not exist."""
    return UserError(f"{kind} has no data set {name!r}: choose one of {', '.join(known)}")
