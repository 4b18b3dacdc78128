"""A prepared directory: what `python -m moe_jax prepare` leaves, and how it is read.

DIR/moe_jax_data.json     the record, written last: a directory without it is not finished; it has a digest of every file and of itself
DIR/rows/packed_text/     the rows, a TFDS dataset in ArrayRecord files with the splits train and heldout
DIR/tokenizer/            the tokenizer
DIR/heldout_domain.npy    the domain number of each held-out row
DIR/texts/SPLIT.N.gz      the first text of domain N, for the baselines of general compressors
"""

import gzip
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.data import tokenizer
from moe_jax.data.pack import Rows
from moe_jax.data.part import Part, Store
from moe_jax.data.sources.characters import readable
from moe_jax.data.sources.tfds_datasets import damage, intact
from moe_jax.data.survey import Counts, Survey
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

RECORD = "moe_jax_data.json"
# held while a directory is prepared; its presence marks the directory as ours
LOCK = ".moe_jax_prepare"
FORMAT = 1
# The fields of pack.Rows, in their order, under their names on disk.
FIELDS = ("inputs", "targets", "segment", "domain")
# Keys that every record has, and all that a record without digests may have: before, there was
# none.
KEYS = {
    "format",
    "fingerprint",
    "arguments",
    "vocab_size",
    "domains",
    "rows",
    "documents",
    "text_bytes",
    "files",
}
KEYS_BEFORE_DIGESTS = KEYS | {"heldout_piece_bytes"}


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
        "digests": {name: _sha256(folder / name) for name in files},
    }
    record["digest"] = _digest(record)
    unfinished = folder / (RECORD + ".unfinished")
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / RECORD)


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if path.is_file() and not path.name.startswith((".", RECORD))]


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """The record of a finished directory; UserError if it is not finished, not ours, or of another
    version.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / LOCK).exists():
            raise UserError(
                f"{folder} is not finished: its preparation was interrupted, run the same command "
                "again"
            ) from None
        raise UserError(
            f"{folder} is no prepared directory (no {RECORD}): make one with `python -m moe_jax "
            "prepare`"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder / RECORD, str(error), folder) from None
    if not isinstance(record, dict):
        raise _damaged(folder / RECORD, "it holds no object", folder)
    if "digest" in record and record["digest"] != _digest(record):
        raise _damaged(folder / RECORD, "it is not what was written, by its digest", folder)
    if record.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{folder} was prepared by another version (format {FORMAT} is read here): prepare it "
            "again"
        )
    if not KEYS <= set(record) or (
        "digest" not in record and not set(record) <= KEYS_BEFORE_DIGESTS
    ):
        raise _damaged(folder / RECORD, "its keys are not those of a record", folder)
    return record


def _digest(record: dict[str, Any]) -> str:
    """sha256 of a record but for its digest."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: pathlib.Path, why: str, folder: pathlib.Path) -> UserError:
    return UserError(
        f"{path} is damaged ({why}): copy {folder} again, or prepare it again in another directory"
    )


def open_prepared(folder: pathlib.Path) -> Part:
    """Opens a finished directory; rows are read from disk as they are asked for."""
    record = read_record(folder)
    check_files(folder, record, small_only=True)
    domains = tuple(record["domains"])
    tokens = tokenizer.load(folder / "tokenizer")

    def text(split: str, domain: str) -> bytes:
        path = text_file(folder, split, domains.index(domain))
        _check_digest(folder, path, record)
        with readable(str(path)):
            return gzip.decompress(path.read_bytes())

    stores = {
        split: _store(folder, split, record["rows"][split], tokens.vocab_size, len(domains))
        for split in record["rows"]
    }
    old = f"{folder} was prepared before files had digests, so not all damage to it is noticed: prepare it again to have them"
    return Part(
        spec=str(folder),
        tokenizer=tokens,
        seq_len=record["arguments"]["seq_len"],
        domains=domains,
        train=stores["train"],
        heldout=stores["heldout"],
        heldout_domain_R=_heldout_domains(folder, record),
        documents=_counts(record["documents"]),
        text_bytes=_counts(record["text_bytes"]),
        heldout_piece_bytes=piece_bytes(record),
        text=text,
        fingerprint=record["fingerprint"],
        notes=() if "digests" in record else (old,),
    )


def _heldout_domains(folder: pathlib.Path, record: dict[str, Any]) -> np.ndarray:
    """The domain number of each held-out row; UserError if one of them is none, or if there are too
    few or too many.
    """
    path = folder / "heldout_domain.npy"
    try:
        domain_R = np.load(path)
    except (
        ValueError,
        OSError,
        EOFError,
        SyntaxError,
    ) as error:  # its header is an expression of Python
        raise _damaged(path, str(error), folder) from None
    rows, domains = record["rows"]["heldout"], len(record["domains"])
    if (
        domain_R.shape != (rows,)
        or domain_R.dtype.kind != "u"
        or (rows and domain_R.max() >= domains)
    ):
        raise _damaged(path, f"it must have {rows} numbers below {domains}", folder)
    return domain_R


def piece_bytes(record: dict[str, Any]) -> dict[str, int]:
    """Bytes that the held-out ids of each domain stand for; a directory prepared long ago does not
    know, and is taken at its text's.
    """
    return record.get("heldout_piece_bytes", record["text_bytes"]["heldout"])


def check_files(folder: pathlib.Path, record: dict[str, Any], small_only: bool) -> None:
    """UserError if a file of a finished directory is missing, or is not what was written, by its
    size or its digest.

    `small_only`: of the rows and the texts the size alone, so that a run begins at once. The rows'
    files have a checksum for every block of rows, which is compared when it is read (`_store`); the
    texts' digests are, when they are read.
    """
    for name, size in record["files"].items():
        path = folder / name
        found = path.stat().st_size if path.exists() else -1
        if found != size:
            what = "is missing" if found < 0 else f"has {found} bytes instead of {size}"
            raise UserError(
                f"{path} {what}: copy {folder} again, or prepare it again in another directory"
            )
        large = ".array_record" in name or name.startswith("texts/")
        if not (small_only and large):
            _check_digest(folder, path, record)


def _check_digest(folder: pathlib.Path, path: pathlib.Path, record: dict[str, Any]) -> None:
    """UserError if a file is not what was written; a directory prepared long ago does not know."""
    if "digests" in record and record["digests"].get(str(path.relative_to(folder))) != _sha256(
        path
    ):
        raise _damaged(path, "it is not what was written, by its digest", folder)


def _counts(table: dict[str, dict[str, int]]) -> Counts:
    return {split: dict(numbers) for split, numbers in table.items()}


def _store(
    folder: pathlib.Path, split: str, num_rows: int, vocab_size: int, num_domains: int
) -> Store:
    from moe_jax.data.tfds_import import tfds

    what = f"the {split} rows of {folder}"
    try:
        source: Any = tfds.builder_from_directory(rows_folder(folder)).as_data_source(split=split)
    # the JSON files of a data set are read by several parsers, each of which has errors of its own
    except Exception as error:
        raise damage(what, error) from None
    if len(source) != num_rows:
        raise UserError(
            f"{what} are {len(source)} instead of {num_rows}: copy it again, or prepare it again "
            "in another directory"
        )
    return Store(num_rows, _fetch(source, what, vocab_size, num_domains))


def _fetch(
    source: Any, what: str, vocab_size: int, num_domains: int
) -> Callable[[np.ndarray], Rows]:
    """Reads rows by their indices; UserError for damage.

    NumPy and JAX take a token or a domain that is none for another.
    """

    def fetch(index_N: np.ndarray) -> Rows:
        with intact(what):
            records = source.__getitems__([int(i) for i in index_N])
        rows = Rows(*(np.stack([record[name] for record in records]) for name in FIELDS))
        for values, number in (
            (rows.tokens_RS, vocab_size),
            (rows.targets_RS, vocab_size),
            (rows.domain_RS, num_domains),
        ):
            if values.size and values.max() >= number:
                raise UserError(
                    f"{what} have the number {values.max()} where there are {number} (0 to "
                    f"{number - 1}): they do not belong to the "
                    "tokenizer and the record beside them; prepare it again"
                )
        return rows

    return fetch
