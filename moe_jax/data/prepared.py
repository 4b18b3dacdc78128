"""A prepared directory: what `python -m moe_jax prepare` leaves, and how it is read.

DIR/moe_jax_data.json     the record, written last: a directory without it is not finished
DIR/rows/packed_text/     the rows, a TFDS dataset in ArrayRecord files with the splits train and heldout
DIR/tokenizer/            the tokenizer
DIR/heldout_domain.npy    the domain number of each held-out row
DIR/texts/SPLIT.N.gz      the first text of domain N, for the baselines of general compressors
"""

import gzip
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.data import tokenizer
from moe_jax.data.pack import Rows
from moe_jax.data.part import Part, Store
from moe_jax.data.survey import Counts, Survey
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

RECORD = "moe_jax_data.json"
LOCK = ".moe_jax_prepare"  # held while a directory is prepared; its presence marks the directory as ours
FORMAT = 1
FIELDS = ("inputs", "targets", "segment", "domain")


def rows_folder(folder: pathlib.Path) -> pathlib.Path:
    return folder / "rows" / "packed_text" / "1.0.0"


def text_file(folder: pathlib.Path, split: str, number: int) -> pathlib.Path:
    return folder / "texts" / f"{split}.{number}.gz"


def write_record(
    folder: pathlib.Path,
    arguments: dict[str, Any],
    tokens: Tokenizer,
    found: Survey,
    num_rows: dict[str, int],
    heldout_piece_bytes: dict[str, int],
    fingerprint: str,
) -> None:
    """Declares `folder` finished, in one atomic step."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _data_files(folder)}
    record = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "arguments": arguments,
        "vocab_size": tokens.vocab_size,
        "domains": list(found.domains),
        "rows": num_rows,
        "documents": found.documents,
        "text_bytes": found.text_bytes,
        "heldout_piece_bytes": heldout_piece_bytes,
        "files": files,
    }
    unfinished = folder / (RECORD + ".unfinished")
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / RECORD)


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if path.is_file() and not path.name.startswith((".", RECORD))]


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """The record of a finished directory; UserError if it is not finished, not ours, or of another version."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / LOCK).exists():
            raise UserError(
                f"{folder} is not finished: its preparation was interrupted, run the same command again"
            ) from None
        raise UserError(
            f"{folder} is no prepared directory (no {RECORD}): make one with `python -m moe_jax prepare`"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / RECORD} is damaged: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{folder} was prepared by another version (format {FORMAT} is read here): prepare it again")
    return record


def open_prepared(folder: pathlib.Path) -> Part:
    """Opens a finished directory; rows are read from disk as they are asked for."""
    record = read_record(folder)
    check_files(folder, record["files"])
    domains = tuple(record["domains"])

    def text(split: str, domain: str) -> bytes:
        return gzip.decompress(text_file(folder, split, domains.index(domain)).read_bytes())

    return Part(
        spec=str(folder),
        tokenizer=tokenizer.load(folder / "tokenizer"),
        seq_len=record["arguments"]["seq_len"],
        domains=domains,
        train=_store(folder, "train", record["rows"]),
        heldout=_store(folder, "heldout", record["rows"]),
        heldout_domain_R=np.load(folder / "heldout_domain.npy"),
        documents=_counts(record["documents"]),
        text_bytes=_counts(record["text_bytes"]),
        heldout_piece_bytes=piece_bytes(record),
        text=text,
        fingerprint=record["fingerprint"],
    )


def piece_bytes(record: dict[str, Any]) -> dict[str, int]:
    """Bytes that the held-out ids of each domain stand for; a directory prepared long ago does not know, and is taken at its text's."""
    return record.get("heldout_piece_bytes", record["text_bytes"]["heldout"])


def check_files(folder: pathlib.Path, files: dict[str, int]) -> None:
    """UserError if a file of a finished directory is missing or has another size than when it was written."""
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else -1
        if found != size:
            what = "is missing" if found < 0 else f"has {found} bytes instead of {size}"
            raise UserError(f"{path} {what}: copy {folder} again, or prepare it again in another directory")


def _counts(table: dict[str, dict[str, int]]) -> Counts:
    return {split: dict(numbers) for split, numbers in table.items()}


def _store(folder: pathlib.Path, split: str, num_rows: dict[str, int]) -> Store:
    import tensorflow_datasets as tfds

    source: Any = tfds.builder_from_directory(rows_folder(folder)).as_data_source(split=split)

    def fetch(index_N: np.ndarray) -> Rows:
        records: Sequence[dict[str, np.ndarray]] = source.__getitems__([int(i) for i in index_N])
        return Rows(*(np.stack([record[name] for record in records]) for name in FIELDS))

    return Store(num_rows[split], fetch)
