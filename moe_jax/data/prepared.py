"""The prepared directory that `python -m moe_jax prepare` writes, and how it is read.

DIR/moe_jax_data.json     the record: digests of every file and of itself; it is written last, so a
                          directory without it is not finished
DIR/rows/packed_text/     the rows: a TFDS dataset in ArrayRecord files, splits train and heldout
DIR/tokenizer/            the tokenizer
DIR/heldout_domain.npy    the domain number of each held-out row
DIR/texts/SPLIT.N.gz      the first text of domain N, for the baselines of general compressors
"""

import gzip
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from moe_jax.data.pack import Rows
from moe_jax.data.part import Part, Store
from moe_jax.data.sources.characters import readable
from moe_jax.data.sources.tfds_datasets import damage_error, intact
from moe_jax.data.survey import Survey
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer import load as load_tokenizer
from moe_jax.errors import UserError

RECORD = "moe_jax_data.json"
# The lock is held while a directory is prepared; its presence marks the directory as ours.
LOCK = ".moe_jax_prepare"
FORMAT = 1
# The fields of pack.Rows, in their order, under their names on disk.
FIELDS = ("inputs", "targets", "segment", "domain")
# The last one, in a directory that has documents of which not all is learned.
QUIET = "quiet"
# Every record has KEYS. Older records have no digests; KEYS_BEFORE_DIGESTS are all their keys, so
# that a newer record that has lost its digests is not taken for one of them.
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
    """Returns where TFDS puts the rows of a prepared directory."""
    return folder / "rows" / "packed_text" / "1.0.0"


def text_file(folder: pathlib.Path, split: str, domain: int) -> pathlib.Path:
    """Returns the file of the first text of a domain, given by its number."""
    return folder / "texts" / f"{split}.{domain}.gz"


def write_record(
    folder: pathlib.Path,
    arguments: dict[str, Any],
    tokenizer: Tokenizer,
    surveyed: Survey,
    num_rows: dict[str, int],
    heldout_piece_bytes: dict[str, int],
    fingerprint: str,
) -> None:
    """Writes the record, which declares `folder` finished, in one atomic step."""
    # Names as seen from the folder, which may be moved.
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _data_files(folder)}
    record = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "arguments": arguments,
        "vocab_size": tokenizer.vocab_size,
        "domains": list(surveyed.domains),
        "rows": num_rows,
        "documents": surveyed.documents,
        "text_bytes": surveyed.text_bytes,
        "heldout_piece_bytes": heldout_piece_bytes,
        # A directory whose text is learned whole is as it always was.
        **({QUIET: True} if surveyed.has_quiet else {}),
        "files": files,
        "digests": {name: _sha256(folder / name) for name in files},
    }
    # The digest of the record itself comes last: it is of all other entries.
    record["digest"] = _digest(record)
    # Renamed at the end: a kill leaves no half of a record under its name.
    unfinished = folder / (RECORD + ".unfinished")
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / RECORD)


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns all files of a prepared directory, sorted, without the record and the lock."""
    paths = sorted(folder.rglob("*"))
    return [path for path in paths if path.is_file() and not path.name.startswith((".", RECORD))]


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the record of a finished directory.

    Raises UserError if the directory is not finished, not ours, damaged, or of another version.
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
    keys = set(record)
    lost_digest = "digest" not in keys and not keys <= KEYS_BEFORE_DIGESTS
    if not keys >= KEYS or lost_digest:
        raise _damaged(folder / RECORD, "its keys are not those of a record", folder)
    return record


def _digest(record: dict[str, Any]) -> str:
    """Returns the sha256 of a record without its own digest."""
    rest = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: pathlib.Path, why: str, folder: pathlib.Path) -> UserError:
    """Returns the error for a damaged file of the prepared directory `folder`."""
    return UserError(
        f"{path} is damaged ({why}): copy {folder} again, or prepare it again in another directory"
    )


def open_prepared(folder: pathlib.Path) -> Part:
    """Opens a finished directory; rows are read from disk as they are asked for."""
    record = read_record(folder)
    check_files(folder, record, small_only=True)
    domains = tuple(record["domains"])
    tokenizer = load_tokenizer(folder / "tokenizer")

    def text(split: str, domain: str) -> bytes:
        path = text_file(folder, split, domains.index(domain))
        _check_digest(folder, path, record)
        with readable(str(path)):
            return gzip.decompress(path.read_bytes())

    stores = {
        split: _store(folder, record, split, num_rows, tokenizer.vocab_size)
        for split, num_rows in record["rows"].items()
    }
    without_digests = (
        f"{folder} was prepared before files had digests, so not all damage to it is noticed: "
        "prepare it again to have them"
    )
    return Part(
        spec=str(folder),
        tokenizer=tokenizer,
        seq_len=record["arguments"]["seq_len"],
        domains=domains,
        train=stores["train"],
        heldout=stores["heldout"],
        heldout_domain_R=_heldout_domains(folder, record),
        documents=record["documents"],
        text_bytes=record["text_bytes"],
        heldout_piece_bytes=piece_bytes(record),
        text=text,
        fingerprint=record["fingerprint"],
        has_quiet=record.get(QUIET, False),
        notes=() if "digests" in record else (without_digests,),
    )


def _heldout_domains(folder: pathlib.Path, record: dict[str, Any]) -> np.ndarray:
    """Returns the domain number of each held-out row.

    Raises UserError if there are too few or too many, or if one of them is no domain.
    """
    path = folder / "heldout_domain.npy"
    try:
        domain_R = np.load(path)
    # SyntaxError: the header of the file is an expression of Python.
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise _damaged(path, str(error), folder) from None
    num_rows = record["rows"]["heldout"]
    num_domains = len(record["domains"])
    # Unsigned, so a negative number cannot stand in it.
    right_type = domain_R.shape == (num_rows,) and domain_R.dtype.kind == "u"
    if not right_type or (num_rows and domain_R.max() >= num_domains):
        raise _damaged(path, f"it must have {num_rows} numbers below {num_domains}", folder)
    return domain_R


def piece_bytes(record: dict[str, Any]) -> dict[str, int]:
    """Returns the bytes that the held-out ids of each domain stand for.

    An old record does not have them; they are taken to be the bytes of the text.
    """
    return record.get("heldout_piece_bytes", record["text_bytes"]["heldout"])


def check_files(folder: pathlib.Path, record: dict[str, Any], small_only: bool) -> None:
    """Raises UserError if a file of a finished directory is missing or is not what was written.

    Sizes and digests are compared. With `small_only`, rows and texts are compared by size alone, so
    that a run begins at once. Their content is checked when it is read: ArrayRecord has a checksum
    for every block of rows, and `Part.text` compares the digest.
    """
    for name, size in record["files"].items():
        path = folder / name
        if not path.exists():
            raise _lost(path, "is missing", folder)
        actual = path.stat().st_size
        if actual != size:
            raise _lost(path, f"has {actual} bytes instead of {size}", folder)
        large = ".array_record" in name or name.startswith("texts/")
        if not (small_only and large):
            _check_digest(folder, path, record)


def _lost(path: pathlib.Path, what: str, folder: pathlib.Path) -> UserError:
    """Returns the error for a file that is not there, or not all of it."""
    return UserError(
        f"{path} {what}: copy {folder} again, or prepare it again in another directory"
    )


def _check_digest(folder: pathlib.Path, path: pathlib.Path, record: dict[str, Any]) -> None:
    """Raises UserError if a file is not what was written, by the digests of the record if it has
    any.
    """
    if "digests" not in record:
        return
    name = str(path.relative_to(folder))
    if record["digests"].get(name) != _sha256(path):
        raise _damaged(path, "it is not what was written, by its digest", folder)


def _store(
    folder: pathlib.Path, record: dict[str, Any], split: str, num_rows: int, vocab_size: int
) -> Store:
    """Opens the rows of a split. Raises UserError for damage or another number than recorded."""
    from moe_jax.data.tfds_import import tfds

    what, num_domains = f"the {split} rows of {folder}", len(record["domains"])
    fields = (*FIELDS, QUIET) if record.get(QUIET) else FIELDS
    try:
        builder = tfds.builder_from_directory(rows_folder(folder))
        source: Any = builder.as_data_source(split=split)
    # The JSON files of a data set are read by several parsers, each of which has errors of its own.
    except Exception as error:
        raise damage_error(what, error) from None
    if len(source) != num_rows:
        raise UserError(
            f"{what} are {len(source)} instead of {num_rows}: copy it again, or prepare it again "
            "in another directory"
        )

    def fetch(index_N: np.ndarray) -> Rows:
        with intact(what):
            records = source.__getitems__([int(i) for i in index_N])
        rows = Rows(*(np.stack([row[name] for row in records]) for name in fields))
        # NumPy and JAX would take an index that is out of range for another one, without a word.
        _check_range(rows.tokens_RS, vocab_size, what)
        _check_range(rows.targets_RS, vocab_size, what)
        _check_range(rows.domain_RS, num_domains, what)
        return rows

    return Store(num_rows, fetch)


def _check_range(values: np.ndarray, end: int, what: str) -> None:
    """Raises UserError if a value is not below `end`."""
    if values.size and values.max() >= end:
        raise UserError(
            f"{what} have the number {values.max()} where there are {end} (0 to "
            f"{end - 1}): they do not belong to the "
            "tokenizer and the record beside them; prepare it again"
        )
