"""Writes a prepared directory: reads the sources several times, in bounded memory, and declares it
finished last.
"""

import contextlib
import gzip
import io
import itertools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from moe_jax.data import pack, prepared, sources, tokenizer
from moe_jax.data.documents import Document
from moe_jax.data.survey import Survey, fingerprint, only, survey
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.runtime import shell

TEXT_BYTES = 4_000_000  # of each split and domain, kept for the baselines

Track = Callable[
    [str, Iterable[Any]], Iterable[Any]
]  # (what is done, items) -> the same items, their progress shown


def write(out: pathlib.Path, arguments: dict[str, Any], track: Track) -> dict[str, Any]:
    """Prepares `arguments` (sources, tokenizer, seq_len, heldout_every, seed) into `out` and
    returns its record.

    An `out` that was finished with the same arguments is left as it is; unfinished work in it is
    begun anew. UserError if it holds anything else, or if another process is at it.
    """
    with _locked(out):
        if (out / prepared.RECORD).exists():
            return _finished(out, arguments)
        for name in ("rows", "tokenizer", "texts"):
            shutil.rmtree(out / name, ignore_errors=True)

        def documents() -> Iterator[tuple[str, Document]]:
            read = itertools.chain.from_iterable(
                sources.read(spec) for spec in arguments["sources"]
            )
            return pack.split(read, arguments["heldout_every"])

        found = survey(_kept(track("reading documents", documents()), out))

        def texts():
            return (d.text for d in only(track("training the tokenizer", documents()), "train"))

        tokens = tokenizer.make(arguments["tokenizer"], texts)
        tokens.save(out / "tokenizer")
        splits = {
            split: _rows(split, only(documents(), split), tokens, found, arguments)
            for split in pack.SPLITS
        }
        num_rows, piece_bytes = _write_rows(
            out, arguments["seq_len"], tokens, splits, found.domains, track
        )
        rest = [arguments[name] for name in ("seq_len", "heldout_every", "seed")]
        prepared.write_record(
            out, arguments, tokens, found, num_rows, piece_bytes, fingerprint(found, tokens, *rest)
        )
    return prepared.read_record(out)


@contextlib.contextmanager
def _locked(out: pathlib.Path) -> Iterator[None]:
    """Makes `out`, if it is not somebody else's, and holds its lock."""
    if out.is_dir() and any(out.iterdir()) and not (out / prepared.LOCK).exists():
        raise UserError(
            f"--out {out} is not empty and was not made by prepare: choose another directory"
        )
    with shell.held(out, "--out", prepared.LOCK):
        yield


def _finished(out: pathlib.Path, arguments: dict[str, Any]) -> dict[str, Any]:
    record = prepared.read_record(out)
    prepared.check_files(out, record, small_only=False)
    for name, wanted in arguments.items():
        have = record["arguments"].get(name)
        if have != wanted:
            raise UserError(
                f"--out {out} was prepared with {name} {have}, not {wanted}: choose another "
                "directory, or delete it"
            )
    return record


def _kept(
    documents: Iterable[tuple[str, Document]], out: pathlib.Path
) -> Iterator[tuple[str, Document]]:
    """The same documents; the first text of each split and domain goes into out/texts on the way."""
    (out / "texts").mkdir()
    with contextlib.ExitStack() as stack:
        numbers: dict[str, int] = {}
        files: dict[tuple[str, str], list[Any]] = {}
        for split, document in documents:
            number = numbers.setdefault(document.domain, len(numbers))
            key = (split, document.domain)
            if key not in files:
                path = prepared.text_file(out, split, number)
                files[key] = [stack.enter_context(gzip.open(path, "wb", compresslevel=6)), 0]
            file, size = files[key]
            if size < TEXT_BYTES:
                files[key][1] += file.write(document.text.encode("utf-8"))
            yield split, document


def _rows(
    split: str,
    documents: Iterable[Document],
    tokens: Tokenizer,
    found: Survey,
    arguments: dict[str, Any],
) -> Iterator[pack.Rows]:
    if split == "train":
        return pack.pack_train(
            documents, arguments["seq_len"], tokens, found.domains, arguments["seed"]
        )
    return pack.pack_heldout(documents, arguments["seq_len"], tokens, found.domains)


def _write_rows(
    out: pathlib.Path,
    seq_len: int,
    tokens: Tokenizer,
    splits: dict[str, Iterator[pack.Rows]],
    domains: tuple[str, ...],
    track: Track,
) -> tuple[dict[str, int], dict[str, int]]:
    """Writes the rows of both splits with TFDS; returns how many, and the bytes that the held-out
    ids of each domain stand for.
    """
    from moe_jax.data.tfds_builder import build_packed_text

    heldout_domain: list[np.ndarray] = []
    bytes_V, bytes_Z = tokens.token_bytes(), np.zeros(len(domains), np.int64)

    def examples(split: str) -> Iterator[dict[str, np.ndarray]]:
        for rows in splits[split]:
            if split == "heldout":
                heldout_domain.append(rows.domain_RS[:, 0])
                seen = rows.segment_RS > 0
                np.add.at(bytes_Z, rows.domain_RS[seen], bytes_V[rows.targets_RS[seen]])
            yield from (dict(zip(prepared.FIELDS, row)) for row in zip(*rows))

    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # TFDS prints about downloads, and there are none
        rows = {name: track(f"writing {name} rows", examples(name)) for name in splits}
        num_rows = build_packed_text(out / "rows", seq_len, tokens.dtype, rows)
    for domain, size in zip(domains, bytes_Z):
        if not size:
            raise UserError(
                f"tokenizer {tokens.name} knows nothing of the held-out text of domain {domain}: "
                "choose another"
            )
    np.save(out / "heldout_domain.npy", np.concatenate(heldout_domain))
    return num_rows, dict(zip(domains, bytes_Z.tolist()))
