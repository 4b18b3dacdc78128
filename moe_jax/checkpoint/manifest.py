"""The manifest, which makes a directory a checkpoint, and what is wrong with a checkpoint.

The manifest holds the digest of every file, and one of itself. Manifests that were written before
it had that are read too.
"""

import errno
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "moe_jax.json"
# Key of the manifest's digest of itself.
OWN_DIGEST = "sha256"
PREFIX = "step_"
# {file: [bytes, SHA-256]}, by its path below the checkpoint.
Files = dict[str, list[Any]]


class Damaged(ValueError):
    """The text says what is wrong with a checkpoint, without its path."""


def step_name(step: int) -> str:
    """Returns the name of the directory of a step; names sort like steps up to 8 digits."""
    return f"{PREFIX}{step:08d}"


def write(path: Path, content: dict[str, Any]) -> None:
    """Commits the checkpoint at `path`, by one atomic rename; `content` has all of ENTRIES."""
    # Through JSON and back: the digest is that of what a reader gets, lists in place of tuples.
    content = json.loads(json.dumps(content))
    signed = {**content, OWN_DIGEST: own_digest(content)}
    # Killed while it writes, it leaves a .part, which nobody takes for a manifest. It is on disk
    # before it gets its name: a power cut cannot leave an empty manifest.
    part = path / (MANIFEST + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(signed, indent=1))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / MANIFEST)


def read(path: Path) -> dict[str, Any]:
    """Returns the manifest of the checkpoint at `path`. Raises Damaged."""
    try:
        with open_file(path / MANIFEST) as file:
            content = json.loads(file.read())
        _refuse_damage(content, path.name)
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise Damaged(f"{MANIFEST} is nested too deep") from None
    # A Damaged is a ValueError, too: it already says what is wrong.
    except Damaged:
        raise
    except ValueError:
        raise Damaged(f"{MANIFEST} is no JSON") from None
    return content


def damage(path: Path, part: int = 0, parts: int = 1) -> str:
    """Returns what is wrong with the checkpoint at `path`; "" when every file has its digest.

    `part`, `parts`: of the files only this part is read, of so many that are read elsewhere.
    """
    try:
        files = read(path)["files"]
    except Damaged as error:
        return str(error)

    def change(name: str) -> str:
        return _changed(path, name, files[name])

    with ThreadPoolExecutor(8) as pool:
        # One is enough: files that no thread has begun to read are then left out.
        return next(filter(None, pool.map(change, shares(files, parts)[part])), "")


def shares(files: Files, parts: int) -> list[list[str]]:
    """Returns the names of files in parts of about as many bytes, the same wherever it is called.

    No part has more than the mean and one file.
    """
    names: list[list[str]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    # The largest first, each to the part that has the least so far; names settle what is equal.
    for name in sorted(files, key=lambda name: (-files[name][0], name)):
        least = sizes.index(min(sizes))
        names[least].append(name)
        sizes[least] += files[name][0]
    return names


def file_names(path: Path) -> list[str]:
    """Returns all files below `path` but the manifest, by their paths from there, sorted."""
    names = []
    for folder, _, files in os.walk(path):
        for file in files:
            # Neither the manifest nor its .part, in which the digests will stand.
            if not file.startswith(MANIFEST):
                names.append(os.path.relpath(os.path.join(folder, file), path))
    return sorted(names)


def digests(path: Path, names: Iterable[str]) -> Files:
    """Returns the digests of files below `path`; 1.8 GB/s a core."""

    def digest(name: str) -> list[Any]:
        return _digest(path / name)

    names = list(names)
    # Hashing leaves the interpreter's lock, so threads take all cores.
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names)))


def own_digest(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest that does not have one yet, whatever its spacing."""
    # Sorted, so that it does not depend on the order in which keys were written.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_file(path: Path) -> io.BufferedReader:
    """Opens a file for reading. Raises OSError when it is none: a pipe would be waited for."""
    # Without O_NONBLOCK the opening itself would wait for a writer of the pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


def _digest(path: Path) -> list[Any]:
    """Returns [bytes, SHA-256] of a file, as the manifest has them."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        return [size, hashlib.file_digest(file, "sha256").hexdigest()]


def _changed(path: Path, name: str, wanted: list[Any]) -> str:
    """Returns what is wrong with one file; "" for nothing."""
    try:
        is_same = _digest(path / name) == wanted
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    # A name with a zero byte in it.
    except ValueError:
        return f"{MANIFEST} names the file {name!r}"
    return "" if is_same else f"{name} has changed since it was written"


def _refuse_damage(content: Any, name: str) -> None:
    """Raises Damaged unless `content` is the manifest of directory `name`, as it was written."""
    if not isinstance(content, dict):
        raise Damaged(f"{MANIFEST} is a {type(content).__name__}")
    # Those written before there was a digest have none.
    signed = OWN_DIGEST in content
    # The digest is of everything but itself.
    if signed and content.pop(OWN_DIGEST) != own_digest(content):
        raise Damaged(f"{MANIFEST} has changed since it was written")
    for key, (is_valid, description) in ENTRIES.items():
        if key not in content:
            raise Damaged(f"{MANIFEST} has no {key!r}")
        if not is_valid(content[key]):
            raise Damaged(f"{key!r} of {MANIFEST} is not {description}")
    unknown = sorted(content.keys() - ENTRIES.keys())
    # With a digest it is what a later version wrote.
    if unknown and not signed:
        raise Damaged(f"{MANIFEST} has an entry {unknown[0]!r}, which nobody writes")
    # A directory that was copied or renamed by hand would be restored as another step.
    if step_name(content["step"]) != name:
        raise Damaged(f"{MANIFEST} is that of step {content['step']}")


def _is_step(value: Any) -> bool:
    """Returns whether a value of JSON is a whole number from 0 on; True is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_score(value: Any) -> bool:
    # Python reads NaN from JSON, and no order of scores has a place for it.
    return value is None or (isinstance(value, float | int) and not math.isnan(value))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _are_arrays(value: Any) -> bool:
    """Returns whether a value is {name: [shape, dtype]}."""
    if not isinstance(value, dict):
        return False
    return all(
        _is_pair(entry, list, str) and all(map(_is_step, entry[0])) for entry in value.values()
    )


def _are_files(value: Any) -> bool:
    """Returns whether a value is {name: [bytes, SHA-256]}, with names below the checkpoint."""
    if not isinstance(value, dict) or not all(map(_lies_below, value)):
        return False
    return all(_is_pair(entry, int, str) for entry in value.values())


def _lies_below(name: str) -> bool:
    """Returns whether a path leads to what is below the place where it begins."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_pair(value: Any, first: type, second: type) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and isinstance(value[0], first) and isinstance(value[1], second)


# What a manifest has: key -> (whether a value is valid, what it should be).
ENTRIES = {
    "step": (_is_step, "a number of a step"),
    "score": (_is_score, "a score"),
    "metadata": (_is_dict, "a dict"),
    "arrays": (_are_arrays, "a list of arrays"),
    "files": (_are_files, "a list of files"),
}
