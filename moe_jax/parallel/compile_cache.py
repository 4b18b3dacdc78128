"""Programs that were compiled once are kept, for the next start of the same run.

JAX reads and writes the entries (its persistent compilation cache), and knows by a key of the
program, its options and its devices whether one fits. This file decides where they lie, and that
what lies there can be trusted: an entry is executed, so whoever can write it can run code.

    ~/.cache/moe_jax/compiled/HARDWARE/    one directory for each jaxlib and kind of processor
        NAME-cache                         an entry, by JAX
        digests.json                       the SHA-256 of every entry

A start deletes the entries whose digest is not that, and the oldest ones beyond MOST_BYTES.
"""

import hashlib
import json
import os
import platform
import stat
import time
from importlib.metadata import version
from pathlib import Path

import jax

AUTO = "auto"
# An option of jax.
DIRECTORY = "jax_compilation_cache_dir"
DIGESTS = "digests.json"
# Seconds after which an entry is written.
SETTLED = 1.0
# Of all entries; the oldest are deleted first.
MOST_BYTES = 1 << 30
HIT = "/jax/compilation_cache/cache_hits"
ENTRY = "*-cache"


class CompileCache:
    """The cache of this process.

    Args:
      where: a directory; AUTO = that of the user; "" = none.
    """

    def __init__(self, where: str):
        self._hits_before = _hits[0]
        self.note = ""  # why there is none, to be told
        self._directory: Path | None = None
        if not where:
            return
        root = default_directory() if where == AUTO else Path(where)
        directory = root / hardware()
        if in_use():
            # That of an earlier run of this process; or whoever started it has one of his own.
            self._directory = directory if in_use() == str(directory) else None
            return
        try:
            make_private(root, directory)
            clean(directory)
        except OSError as error:
            self.note = f"compiled programs are not kept: {root}: {error.strerror or error}"
            return
        self._directory = directory
        for name, value in (
            (DIRECTORY, str(directory)),
            # Small programs are kept, too: a run has many of them.
            ("jax_persistent_cache_min_compile_time_secs", 0.0),
            ("jax_persistent_cache_min_entry_size_bytes", -1),
        ):
            jax.config.update(name, value)
        jax.monitoring.register_event_listener(_listen)

    @property
    def hits(self) -> int:
        """Returns the number of programs of this run so far that were found in the cache."""
        return _hits[0] - self._hits_before

    def keep(self) -> None:
        """Notes the digests of the entries: from here on the next start trusts them.

        To be called at every save and at the end, so that a process that is killed has compiled
        for the next one.
        """
        if self._directory is None:
            return
        try:
            write_digests(self._directory)
        except OSError:
            # Without its digest an entry is deleted by the next start: no more is lost.
            pass


# Hits of this process. A list, because jax calls a function and keeps no count itself.
_hits = [0]


def _listen(event: str, **_: object) -> None:
    """Counts the hits among all events that jax reports."""
    _hits[0] += event == HIT


def in_use() -> str:
    """Returns the directory that jax has been given; "" for none."""
    return getattr(jax.config, DIRECTORY) or ""


def default_directory() -> Path:
    """Returns where the user's caches lie (the XDG base directory specification)."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if caches else Path.home() / ".cache") / "moe_jax" / "compiled"


def hardware() -> str:
    """Returns a name for what compiled programs depend on beside what JAX's key has: a processor
    with other instructions would end the process by SIGILL.
    """
    facts = [version("jaxlib"), version("jax"), platform.machine(), processor_flags()]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def processor_flags() -> str:
    """Returns the instruction sets of this processor; "" where the system does not tell them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def make_private(root: Path, directory: Path) -> None:
    """Makes the directories, readable and writable by this user alone.

    Raises OSError when one belongs to somebody else, or others may write to it.
    """
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    directory.mkdir(exist_ok=True, mode=0o700)
    # They may have been there before, with other rights.
    for path in (root, directory):
        status = os.stat(path)
        if status.st_uid != os.getuid():
            raise OSError(0, f"{path} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(0, f"others may write to {path}: chmod 700 it, or set compile_cache")


def clean(directory: Path) -> None:
    """Deletes entries that are damaged or foreign, and the oldest ones of too many bytes."""
    known = _read_digests(directory)
    # The newest first, so that the oldest are beyond the limit.
    entries = sorted(directory.glob(ENTRY), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in entries:
        total += path.stat().st_size
        if total > MOST_BYTES or known.get(path.name) != _digest(path):
            path.unlink(missing_ok=True)


def write_digests(directory: Path) -> None:
    """Notes the digest of every entry, in one rename.

    An entry that is only just there may be one that another process is still writing.
    """
    settled = time.time() - SETTLED
    entries = [path for path in directory.glob(ENTRY) if path.stat().st_mtime < settled]
    digests = {path.name: _digest(path) for path in entries}
    # Written beside it and renamed: another process reads the old file or the new one.
    part = directory / f"{DIGESTS}.{os.getpid()}"
    part.write_text(json.dumps(digests, indent=1))
    part.replace(directory / DIGESTS)


def _read_digests(directory: Path) -> dict[str, str]:
    """Returns the digests by names of entries; none where the file is not there or damaged."""
    try:
        known = json.loads((directory / DIGESTS).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
