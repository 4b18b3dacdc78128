"""What all conversions share: the new directory, and what a run keeps beside its checkpoints."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import UserError

# What a run keeps beside its tokenizer (data/examples.py).
KEPT = ("labels.json", "items.json")


def refuse_filled(flag: str, folder: Path) -> None:
    """Raises UserError for a directory that has something in it."""
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"{flag} {folder} is not empty: name a new directory")


@contextlib.contextmanager
def new_directory(folder: Path) -> Iterator[None]:
    """Makes a directory, and takes it away again when what is done inside fails."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    # An interrupt too.
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def keep_files(workdir: Path, out: Path) -> None:
    """Copies whatever a run keeps for decoding: its tokenizer, and names of labels."""
    if (workdir / "tokenizer").is_dir():
        shutil.copytree(workdir / "tokenizer", out / "tokenizer")
    for name in KEPT:
        if (workdir / name).is_file():
            shutil.copy2(workdir / name, out / name)
