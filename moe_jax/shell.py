"""What a command has of the shell: how it was typed, how it is interrupted, and a directory that it alone may write to."""

import contextlib
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from moe_jax.errors import UserError

LOCK = ".lock"


def command(*arguments: object) -> str:
    """`python -m ARGUMENTS` by the interpreter that runs now, which need not be the `python` of the user's shell."""
    here = Path(sys.executable)
    near = here.is_relative_to(Path.cwd()) and here.relative_to(Path.cwd())
    return shlex.join([str(near or here), "-m", *map(str, arguments)])


def own_command() -> str:
    """What was typed to start this process, to be typed again. launch/local.sh, which starts several, says what it was."""
    return os.environ.get("MOE_JAX_COMMAND") or command("moe_jax.main", *sys.argv[1:])


def console() -> Any:
    """A rich Console: as wide as the terminal, or 160 columns in a file or a pipe, so that no cell of a table is cut."""
    from rich.console import Console  # here: this module comes before everything that takes time to import

    plain = Console()
    return plain if plain.is_terminal else Console(width=max(plain.width, 160))


def end(number: int, frame: FrameType | None) -> None:
    """For a signal before the loop of a run or after it. What is on disk is whole at any moment, so nothing is lost by ending at once."""
    del frame
    print("\ninterrupted: what was saved stays, and the same command goes on from there", file=sys.stderr, flush=True)
    os._exit(128 + number)


@contextlib.contextmanager
def held(directory: Path, flag: str, name: str = LOCK) -> Iterator[None]:
    """Makes a directory and holds its lock, which the system frees even after kill -9. UserError, by the flag, where it cannot be had."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / name, "w")
    except OSError as error:
        raise UserError(
            f"{flag} {directory} cannot be made or written to ({error.strerror}): choose another directory"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{flag} {directory} is in use by another process: wait for it, or choose another directory"
            ) from None
        yield
