"""Writes a prepared directory.

The sources are read several times, in bounded memory. The record, which declares the directory
finished, is written last.
"""

import contextlib
import gzip
import io
import itertools
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

import numpy as np

from moe_jax.data import pack, prepared, sources
from moe_jax.data.documents import AnyDocument
from moe_jax.data.survey import Survey, fingerprint, only, survey
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer import make as make_tokenizer
from moe_jax.errors import UserError
from moe_jax.runtime import shell

# Of each split and domain, kept for the baselines.
TEXT_BYTES = 4_000_000

# (what is done, items) -> the same items, while their progress is shown
Track = Callable[[str, Iterable[Any]], Iterable[Any]]


def write(out: pathlib.Path, arguments: dict[str, Any], track: Track) -> dict[str, Any]:
    """Prepares `out` and returns its record.

    `arguments` has sources, tokenizer, seq_len, heldout_every and seed. An `out` that was finished
    with the same arguments is left as it is; unfinished work in it is begun anew. Raises UserError
    if it holds anything else, or if another process is at it.
    """
    with _locked(out):
        if (out / prepared.RECORD).exists():
            return _finished(out, arguments)
        for name in ("rows", "tokenizer", "texts"):
            shutil.rmtree(out / name, ignore_errors=True)
        _write(out, arguments, track)
    return prepared.read_record(out)


def _write(out: pathlib.Path, arguments: dict[str, Any], track: Track) -> None:
    """Writes all of a prepared directory: texts, tokenizer, rows, record."""
    seq_len, heldout_every, seed = (
        arguments[name] for name in ("seq_len", "heldout_every", "seed")
    )

    # The sources may be larger than memory, so each step reads them anew.
    def documents() -> Iterator[tuple[str, AnyDocument]]:
        of_sources = (sources.read(spec) for spec in arguments["sources"])
        return pack.split(itertools.chain.from_iterable(of_sources), heldout_every)

    def training_texts() -> Iterator[str]:
        tracked = track("training the tokenizer", documents())
        return (document.text for document in only(tracked, "train"))

    # 1. One pass counts and digests the documents, and keeps the first texts on the way.
    surveyed = survey(_with_texts_kept(track("reading documents", documents()), out))
    domains = surveyed.domains
    # 2. A second pass trains the tokenizer, if it is one that is trained.
    tokenizer = make_tokenizer(arguments["tokenizer"], training_texts)
    tokenizer.save(out / "tokenizer")
    # 3. One more pass for each split packs rows, which are written as they come.
    splits = {
        "train": pack.pack_train(only(documents(), "train"), seq_len, tokenizer, domains, seed),
        "heldout": pack.pack_heldout(only(documents(), "heldout"), seq_len, tokenizer, domains),
    }
    num_rows, piece_bytes = _write_rows(out, seq_len, tokenizer, splits, surveyed, track)
    # 4. The record declares the directory finished.
    prepared.write_record(
        out,
        arguments,
        tokenizer,
        surveyed,
        num_rows,
        piece_bytes,
        fingerprint(surveyed, tokenizer, seq_len, heldout_every, seed),
    )


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
    """Returns the record of a finished `out`. Raises UserError if it has other arguments."""
    record = prepared.read_record(out)
    prepared.check_files(out, record, small_only=False)
    for name, wanted in arguments.items():
        recorded = record["arguments"].get(name)
        if recorded != wanted:
            raise UserError(
                f"--out {out} was prepared with {name} {recorded}, not {wanted}: choose another "
                "directory, or delete it"
            )
    return record


def _with_texts_kept(
    documents: Iterable[tuple[str, AnyDocument]], out: pathlib.Path
) -> Iterator[tuple[str, AnyDocument]]:
    """Yields the same documents, and writes the first text of each split and domain.

    A file of out/texts takes documents until it has TEXT_BYTES; the last one is whole.
    """
    (out / "texts").mkdir()
    with contextlib.ExitStack() as stack:
        domain_index: dict[str, int] = {}
        files: dict[tuple[str, str], IO[bytes]] = {}
        sizes: Counter[tuple[str, str]] = Counter()
        for split, document in documents:
            domain = document.domain
            key = (split, domain)
            domain_index.setdefault(domain, len(domain_index))
            if key not in files:
                path = prepared.text_file(out, split, domain_index[domain])
                files[key] = stack.enter_context(_open_gzip(path))
            if sizes[key] < TEXT_BYTES:
                sizes[key] += files[key].write(document.text.encode("utf-8"))
            yield split, document


def _open_gzip(path: pathlib.Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "wb", compresslevel=6))


def _write_rows(
    out: pathlib.Path,
    seq_len: int,
    tokenizer: Tokenizer,
    splits: dict[str, Iterator[pack.Rows]],
    surveyed: Survey,
    track: Track,
) -> tuple[dict[str, int], dict[str, int]]:
    """Writes the rows of both splits with TFDS, and the domains of the held-out ones.

    Returns the number of rows of each split, and the bytes that the held-out ids of each domain
    stand for. Raises UserError if those are none: bits per byte would have no meaning.
    """
    from moe_jax.data.tfds_builder import build_packed_text

    domains, has_quiet = surveyed.domains, surveyed.has_quiet
    heldout_domain: list[np.ndarray] = []
    bytes_V = tokenizer.token_bytes()
    bytes_Z = np.zeros(len(domains), np.int64)

    def stored_rows(split: str) -> Iterator[dict[str, np.ndarray]]:
        for rows in splits[split]:
            if split == "heldout":
                # A held-out row is of one domain, so its first place tells it.
                heldout_domain.append(rows.domain_RS[:, 0])
                valid_RS = rows.segment_RS > 0
                target_bytes = bytes_V[rows.targets_RS[valid_RS]]
                # Adds up repeated domains too, which `bytes_Z[...] +=` would not.
                np.add.at(bytes_Z, rows.domain_RS[valid_RS], target_bytes)
            if has_quiet and rows.quiet_RS is None:
                rows = rows._replace(quiet_RS=np.zeros(rows.tokens_RS.shape, np.uint8))
            fields = [field for field in rows if field is not None]
            for row in zip(*fields):
                yield dict(zip((*prepared.FIELDS, prepared.QUIET), row))

    # TFDS prints about downloads, and there are none.
    with contextlib.redirect_stdout(io.StringIO()):
        rows = {split: track(f"writing {split} rows", stored_rows(split)) for split in splits}
        num_rows = build_packed_text(out / "rows", seq_len, tokenizer.dtype, rows, has_quiet)
    for domain, size in zip(domains, bytes_Z):
        if not size:
            raise UserError(
                f"tokenizer {tokenizer.name} knows nothing of the held-out text of domain "
                f"{domain}: choose another"
            )
    np.save(out / "heldout_domain.npy", np.concatenate(heldout_domain))
    return num_rows, dict(zip(domains, bytes_Z.tolist()))
