"""Another name for a directory, of plain characters, which is what Orbax and TensorStore are given.

Orbax looks for its own files with a glob over the whole path, so it does not see them below
`sweep[1]`. TensorStore takes a backslash for a slash, and refuses colons, `.__lock` and names that
are not UTF-8. A directory that is open has a second name, /proc/self/fd/NUMBER, which is free of
all that.
"""

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_jax.errors import UserError

# Linux; other systems have no such names for directories.
OPEN_FILES = Path("/proc/self/fd")
PLAIN = re.compile(r"[\w/ .,=+@-]*", re.ASCII)


def refuse_unreadable(directory: Path) -> None:
    """Raises UserError when checkpoints in `directory` could not be read back on this system."""
    if not OPEN_FILES.is_dir() and not PLAIN.fullmatch(os.fspath(directory)):
        strange = sorted(set(PLAIN.sub("", os.fspath(directory))))
        raise UserError(
            f"checkpoints cannot be written to {os.fspath(directory)!r} on this system: the "
            f"library that writes them misreads {' '.join(map(repr, strange))} in a path. Choose "
            "another"
        )


def alone(number: int) -> list[int]:
    """Returns the numbers of all processes, where there is one."""
    return [number]


@contextlib.contextmanager
def plain(directory: Path, gather: Callable[[int], list[int]] = alone) -> Iterator[Path]:
    """Yields a path of plain characters that leads to `directory` until the block is left.

    Args:
      gather: collects a number of every process. The path is the same on all that take part.
    """
    if not OPEN_FILES.is_dir():
        yield directory
        return
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    descriptor = _same_everywhere(opened, gather)
    try:
        yield OPEN_FILES / str(descriptor)
    finally:
        os.close(descriptor)


def _same_everywhere(descriptor: int, gather: Callable[[int], list[int]]) -> int:
    """Exchanges an open file for one whose number is the same in every process."""
    numbers = gather(descriptor)
    # All but the highest move up, each to the first number that is free from the highest on. That
    # may be above it, so they ask again until all agree.
    while len(set(numbers)) > 1:
        if descriptor < max(numbers):
            higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(numbers))
            os.close(descriptor)
            descriptor = higher
        numbers = gather(descriptor)
    return descriptor
