"""`python -m moe_jax prepare`: tokenizes and packs text once, for runs to read.

Finished work is recognised and kept; an interrupted run leaves nothing that looks finished, and the
same command finishes it.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from moe_jax.data import prepared, sources, writer
from moe_jax.data.tokenizer import TOKENIZERS
from moe_jax.errors import UserError
from moe_jax.runtime import shell
from moe_jax.terminal import working
from moe_jax.terminal.table import Table, names, numbers


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax prepare", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--source", action="append", required=True, help=f"may be repeated: {sources.usage()}"
    )
    parser.add_argument(
        "--tokenizer", default="bytes", help="bytes, bpe:VOCAB (trained on the source) or file:PATH"
    )
    parser.add_argument("--seq_len", type=int, default=256, help="tokens of a row")
    parser.add_argument(
        "--heldout_every",
        type=int,
        default=20,
        help="every n-th document of each domain is held out",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a new directory")
    return parser.parse_args(argv)


def refuse_wrong_flags(flags: argparse.Namespace) -> None:
    """Raises UserError for a flag that cannot work, before anything is read."""
    for spec in flags.source:
        sources.parse(spec)
        if flags.source.count(spec) > 1:
            raise UserError(
                f"--source {spec} is given twice: held-out documents would come again in training"
            )
    if flags.tokenizer.partition(":")[0] not in TOKENIZERS:
        raise UserError(f"--tokenizer {flags.tokenizer} is none of: bytes, bpe:VOCAB, file:PATH")
    for name, least in (("seq_len", 2), ("heldout_every", 2), ("seed", 0)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name} {getattr(flags, name)} must be at least {least}")


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 when the directory is finished, 130 when interrupted."""
    flags = parse(argv)
    refuse_wrong_flags(flags)
    arguments = {
        "sources": flags.source,
        "tokenizer": flags.tokenizer,
        "seq_len": flags.seq_len,
        "heldout_every": flags.heldout_every,
        "seed": flags.seed,
    }
    # The record is written last, so where it is the directory is whole.
    was_finished = (flags.out / prepared.RECORD).exists()
    try:
        with _progress() as track:
            record = writer.write(flags.out, arguments, track)
    # The record is written last: a directory without one is not finished.
    except KeyboardInterrupt:
        shell.tell(
            f"interrupted: {flags.out} is not finished; the same command finishes it", sys.stderr
        )
        return 130
    already = " already, with the same arguments" if was_finished else ""
    shell.tell(f"{flags.out} is finished{already}")
    show(record)
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[writer.Track]:
    """Yields a function that counts, on standard error, what a pass over the sources has done."""
    with working.shown("prepare") as tell:

        def track(what: str, items: Iterable[Any]) -> Iterator[Any]:
            for number, item in enumerate(items, 1):
                tell(f"{what} {number:,}")
                yield item

        yield track


def show(record: dict[str, Any]) -> None:
    """Prints the record for a person to read."""
    shell.console().print(table(record))
    rows, length = record["rows"], record["arguments"]["seq_len"]
    shell.tell(
        f"{rows['train']:,} training rows and {rows['heldout']:,} held-out rows of {length} tokens"
    )
    shell.tell(f"vocabulary {record['vocab_size']:,}, fingerprint {record['fingerprint'][:16]}")
    for note in _lost(record):
        shell.tell(note)


def table(record: dict[str, Any]) -> Table:
    """Returns a row for each domain."""
    columns = numbers("documents", "documents held out", "bytes", "bytes held out")
    result = Table([*names("domain"), *columns])
    documents, text_bytes = record["documents"], record["text_bytes"]
    for domain in record["domains"]:
        result.add(
            domain,
            f"{documents['train'][domain]:,}",
            f"{documents['heldout'][domain]:,}",
            f"{text_bytes['train'][domain]:,}",
            f"{text_bytes['heldout'][domain]:,}",
        )
    return result


def _lost(record: dict[str, Any]) -> Iterator[str]:
    """Yields a note when the tokenizer changes the text: with the domain where it does so the
    most.
    """
    pieces, text = prepared.piece_bytes(record), record["text_bytes"]["heldout"]
    # Where the bytes of the ids are furthest from those of the text, as a share.
    worst = max(record["domains"], key=lambda domain: abs(pieces[domain] / text[domain] - 1))
    if pieces[worst] != text[worst]:
        yield (
            f"note: tokenizer {record['arguments']['tokenizer']} changes the text: its ids stand "
            f"for {pieces[worst]:,} bytes where the held-out text of {worst} has {text[worst]:,}; "
            "bits per byte will count the bytes of the text, as gzip and xz do"
        )
