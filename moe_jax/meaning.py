"""Do rows of a table mean the same in two runs? Token 17 of one tokenizer is not that of another.

A run writes what its numbers mean beside its checkpoints (`Data.save`): the tokenizer, the items of
a recommendation, the labels of classes.
"""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.data import tokenizer
from moe_jax.data.contract import Data
from moe_jax.errors import UserError


class Meaning(NamedTuple):
    """Holds what the numbers of a run stand for."""

    # Of all of them together.
    title: str
    # The begin of a sentence that ends in "them out by ...".
    advice: str
    # What each number stands for.
    names: tuple[Any, ...]


class Kind(NamedTuple):
    """A kind of number, and the parameters that have a row or a column for each number."""

    # In the workdir.
    file: str
    unit: str
    # Prefixes of the names of parameters.
    tables: tuple[str, ...]


KINDS = (
    Kind("tokenizer", "token", ("ends/embed", "ends/head")),
    Kind("items.json", "item", ("ends/embed", "head")),
    Kind("labels.json", "class", ("head", "ends/head")),
)


def compare(run: Path, data: Data, loaded: Iterable[str]) -> list[str]:
    """Returns what to tell of the parameters `loaded` from the workdir `run`.

    Raises UserError when the numbers of a loaded table mean something else in `data`.
    """
    notes: list[str] = []
    loaded = list(loaded)
    with tempfile.TemporaryDirectory() as folder:
        # As a run writes it, so that the same reader reads both.
        data.save(Path(folder))
        for kind in KINDS:
            tables = [name for name in loaded if _is_below(name, kind.tables)]
            here, there = read(Path(folder), kind), read(run, kind)
            if not tables or here is None:
                continue
            # A run of before such files were written.
            if there is None:
                notes.append(
                    f"{run / kind.file} is missing: {' and '.join(tables)} are taken, and whether "
                    f"their {kind.unit} numbers mean the same here is not known"
                )
                continue
            # More names on one side do no harm, as long as the common ones are the same.
            same = sum(1 for a, b in zip(there.names, here.names) if a == b)
            if same < min(len(there.names), len(here.names)):
                raise UserError(_refusal(run, kind, tables, there, here))
            if len(there.names) != len(here.names):
                notes.append(
                    f"{run} has {there.title}, this run {here.title}: there are {len(there.names)} "
                    f"there and {len(here.names)} here, and the first {same} mean the same"
                )
    return notes


def read(workdir: Path, kind: Kind) -> Meaning | None:
    """Returns what the numbers mean in a run; None when it does not say. Raises UserError."""
    path = workdir / kind.file
    if not path.exists():
        return None
    if kind.file == "tokenizer":
        found = tokenizer.load(path)
        pieces: list[Any] = list(found.pieces)
        # It has no bytes of its own.
        pieces[found.boundary_id] = "the boundary"
        title = f"the tokenizer {found.name} (fingerprint {found.fingerprint[:12]})"
        file = tokenizer.MODEL_FILES.get(found.kind)
        spec = f"file:{path / file}" if file else found.kind
        return Meaning(title, f"Give the data that tokenizer ({spec}), or leave", tuple(pieces))
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(names, list):
        raise UserError(f"{path} is damaged: it must hold a list of names")
    return Meaning(f"{len(names)} {kind.unit} names", "Leave", tuple(names))


def _refusal(run: Path, kind: Kind, tables: list[str], there: Meaning, here: Meaning) -> str:
    """Returns the message for tables whose numbers differ, with the first one that does."""
    pairs = enumerate(zip(there.names, here.names))
    first, (before, now) = next((number, pair) for number, pair in pairs if pair[0] != pair[1])
    example = f"{kind.unit} {first} is {before!r} there and {now!r} here"
    leave_out = ", ".join(f'("{name}", "")' for name in tables)
    return (
        f"train.init_from: {run} has {there.title}, this run {here.title}: {example}, so "
        f"{' and '.join(tables)} would be wrong. {there.advice} them out by "
        f"train.init_rename=({leave_out},)"
    )


def _is_below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Returns whether a name is one of the prefixes, or continues one behind a stroke."""
    return any(name == prefix or name.startswith(prefix + "/") for prefix in prefixes)
