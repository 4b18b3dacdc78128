"""What a command has of the shell: how it was typed, where its words go, and a directory that it
alone may write to.
"""

import contextlib
import fcntl
import io
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from moe_jax.errors import UserError
from moe_jax.runtime import signals

LOCK = ".lock"


def command(*arguments: object) -> str:
    """Returns `python -m ARGUMENTS` by the interpreter that runs now.

    It need not be the `python` of the user's shell.
    """
    here = Path(sys.executable)
    # As people type it: "venv/bin/python" in the directory of the venv.
    near = here.is_relative_to(Path.cwd()) and here.relative_to(Path.cwd())
    return shlex.join([str(near or here), "-m", *map(str, arguments)])


def own_command() -> str:
    """Returns what was typed to start this process, to be typed again.

    launch/local.sh, which starts several, says what it was.
    """
    return os.environ.get("MOE_JAX_COMMAND", "").strip() or command("moe_jax.main", *sys.argv[1:])


def going_on(step: int, stop_at: int) -> str:
    """Returns the command that goes on from a step: what was typed, without a train.stop_at that is
    reached, at which it would end at once.
    """
    if not 0 < stop_at <= step:
        return own_command()
    # Everything but the flag that would end the run at once.
    kept, value_follows = [], False
    for word in shlex.split(own_command()):
        name, equals, _ = word.partition("=")
        stop_flag = name.lstrip("-") == "config.train.stop_at"
        # The flag and its value may be two words.
        if not (stop_flag or value_follows):
            kept.append(word)
        value_follows = stop_flag and not equals
    # Said aloud, because the config file may set it too.
    return shlex.join([*kept, "--config.train.stop_at=0"])


def console() -> Any:
    """Returns a rich Console, as wide as the terminal.

    A file or a pipe has 160 columns, or what COLUMNS says.
    """
    # Imported here: this module comes before everything that takes time to import.
    from rich.console import Console

    plain = Console()
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(width=160)


def tell(text: object, stream: TextIO | None = None) -> None:
    """Prints sentences.

    A terminal gets its lines broken between words, a file or a pipe as they are.

    A line that begins with two spaces is a command or a path on its own: it stays whole, to be
    copied.
    """
    stream = stream or sys.stdout
    lines = str(text).split("\n")
    if stream.isatty():
        width = shutil.get_terminal_size().columns
        lines = [line if line.startswith("  ") else _broken(line, width) for line in lines]
    print("\n".join(lines), file=stream, flush=True)


def _broken(line: str, width: int) -> str:
    """Returns a line broken between words.

    A path or a number that is longer than a line is left to the terminal, which can give it back
    whole.
    """
    return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)


def run_command(main: Callable[[list[str]], int], argv: list[str]) -> int:
    """Returns the exit code of `main(argv)`, for a command whose words are its work.

    A signal raises KeyboardInterrupt in it, so that what it has begun is cleared away: 128 + its
    number. Output that nobody reads any more ends it without a word (128 + SIGPIPE), a file that
    cannot be read or written with one line (64).
    """
    open_output(lasting=False)
    heard = signals.LISTENER
    heard.start()
    # A command has no step to end at: it is interrupted wherever it is.
    heard.interrupt()
    code = 0
    try:
        code = main(argv)
        # Here a reader that is gone shows at the latest.
        sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except OSError as error:
        tell(f"error: {reason(error)}", sys.stderr)
        code = 64
    discard_output()
    return 128 + heard.number if heard.number else code


def discard_output() -> None:
    """Drops what can no longer be written: it would fail once more when Python ends."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def reason(error: OSError) -> str:
    """Returns what went wrong with which file, in one line."""
    text = error.strerror or str(error)
    return f"{error.filename}: {text}" if error.filename else text


class Lasting(io.FileIO):
    """A file descriptor for what is said beside the work.

    When it cannot be written any more, it says so once and takes no more: a closed pipe, a full
    disk or a terminal that is gone does not end a run, whose figures are in its workdir.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # From here on what is written goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            with contextlib.suppress(OSError):
                what = (
                    f"standard {'output' if self.fileno() == 1 else 'error'} is gone "
                    f"({error.strerror}): going on without"
                )
                os.write(2, f"{what}\n".encode())
            return len(data)


def open_output(lasting: bool) -> None:
    """Makes standard output and error write every line at once, and escape what their encoding
    lacks.

    For the beginning of a command. Streams that someone else has put in place stay as they are.
    `lasting`: they outlast what they write to (see Lasting).
    """
    # A descriptor that was closed would be that of the next file that is opened, and what is said
    # would go there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            # A test or a notebook has put it there.
            continue
        # None: it was closed.
        if stream is None or lasting:
            encoding = stream.encoding if stream else None
            raw = Lasting(number, "w", closefd=False)
            stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding)
            setattr(sys, name, stream)
        stream.reconfigure(errors="backslashreplace", line_buffering=True)


def refuse_address(directory: str, flag: str) -> None:
    """Raises UserError for an address such as gs://bucket/run, of which a folder called "gs:" would
    become.

    A Path writes gs:/bucket/run.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/", directory):
        raise UserError(
            f"{flag} {directory} is no path: a run writes to a file system, its own or one that "
            "its machines share. Mount the bucket (gcsfuse, s3fs), or copy the directory there"
        )


class Held:
    """A directory that is locked by this process."""

    def __init__(self, path: Path, flag: str, lock: TextIO | None):
        self._path, self._flag, self._lock = path, flag, lock

    def check(self) -> None:
        """Raises UserError when the directory is not the one that was locked: somebody has deleted
        or moved it, and another run may begin there.
        """
        if self._lock is None:
            return
        try:
            # The lock file that is there now has to be the one that this process holds open.
            same = os.path.samestat(os.stat(self._path), os.fstat(self._lock.fileno()))
        except OSError:
            same = False
        if not same:
            raise UserError(
                f"{self._flag} {self._path.parent} was deleted or moved while it was in use (its "
                f"{self._path.name} is gone): nothing more "
                "is written there; start again, there or in another directory"
            )


# For the processes that leave the lock to process 0.
FREE = Held(Path(), "", None)


@contextlib.contextmanager
def held(directory: Path, flag: str, name: str = LOCK) -> Iterator[Held]:
    """Makes a directory and holds its lock, which the system frees even after kill -9.

    Raises UserError, which names the flag, where it cannot be had, and for the address of a bucket.
    """
    refuse_address(str(directory), flag)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / name, "w")
    except OSError as error:
        raise UserError(
            f"{flag} {directory} cannot be made or written to ({error.strerror}): choose another "
            "directory"
        ) from None
    with lock:
        try:
            # The lock is on the open file, so it ends with the process, however that ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{flag} {directory} is in use by another process: wait for it, or choose another "
                "directory"
            ) from None
        yield Held(directory / name, flag, lock)
