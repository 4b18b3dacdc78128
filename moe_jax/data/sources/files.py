"""What kinds of source share that are files: the glob, the field, the domain, the unpacking."""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO

from moe_jax.data.sources import packed
from moe_jax.errors import UserError

# Characters, or bytes, read at once.
BLOCK = 1 << 20


def matches(kind: str, pattern: str) -> list[str]:
    """Returns the files that a glob matches, sorted. Raises UserError if there is none.

    `**` goes into folders, `~` is the home folder. `kind` is for the message.
    """
    matched = glob.glob(os.path.expanduser(pattern), recursive=True)
    # A file system lists names in an order of its own; documents must come in the same one always.
    paths = sorted(path for path in matched if os.path.isfile(path))
    if not paths:
        raise UserError(f"source {kind}:{pattern} matches no file (looked from {os.getcwd()})")
    return paths


def split_field(argument: str, default: str) -> tuple[str, str]:
    """Returns the two parts of `GLOB#FIELD`, or the whole and the default where no # is."""
    pattern, _, field = argument.rpartition("#")
    return (pattern, field) if pattern else (argument, default)


def stem(path: str) -> str:
    """Returns the file's name without its endings: data/laws.jsonl.gz -> laws.

    Bytes of it that are no UTF-8 become U+FFFD.
    """
    name = os.fsencode(os.path.basename(path)).decode("utf-8", "replace")
    return name.split(".")[0] or name


@contextlib.contextmanager
def seekable(path: str) -> Iterator[IO[bytes]]:
    """Opens the content of a file for a reader that seeks in it.

    A packed file is unpacked on disk, not in memory.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(packed.open_bytes(path))
        if packed.packing(path):
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, BLOCK)
            # The position is at the end, which does not matter: such a reader seeks first.
            file = unpacked
        yield file
