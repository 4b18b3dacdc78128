"""Files of `data.folder`: found there or in a folder of their kind in it, read as tables of text."""

import os
import pathlib
import shlex
from collections.abc import Iterator

from moe_jax.data.sources.characters import open_text, plain, readable
from moe_jax.errors import UserError


def find(folder: str, kind: str, name: str, dataset: str) -> pathlib.Path:
    """Returns folder/name or folder/kind/name; UserError, with the command that makes it, if there
    is neither.
    """
    base = pathlib.Path(os.path.expanduser(folder))
    for path in (base / name, base / kind / name):
        if path.exists():
            return path
    command = f"python -m moe_jax data {dataset} --from FILE|DIR --out {shlex.quote(folder)}"
    raise UserError(
        f"data.folder = {folder!r} has neither {name} nor {kind}/{name}: `{command}` makes it from "
        "what its publisher "
        "distributes (`python -m moe_jax data` says where that is)"
    )


def table(path: pathlib.Path, columns: int, header: bool) -> Iterator[list[str]]:
    """The lines of a file with `columns` columns between tabs; UserError for a line that has not as
    many.
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
    """The error for a data set that there is not."""
    return UserError(f"{kind} has no data set {name!r}: choose one of {', '.join(known)}")
