"""What is on disk: the manifest that makes a directory a checkpoint, its verification, and safe deletion.

All of it is done by process 0. Paths are etils paths, so a bucket serves as well as a directory.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

MANIFEST = "moe_jax.json"
PREFIX = "step_"


def step_path(directory: epath.Path, step: int) -> epath.Path:
    return directory / f"{PREFIX}{step:08d}"


def committed_steps(directory: epath.Path) -> list[int]:
    """The steps whose directory has a manifest, in order."""
    names = [p.name for p in directory.iterdir()] if directory.exists() else []
    steps = [int(n.removeprefix(PREFIX)) for n in names if n.startswith(PREFIX) and n.removeprefix(PREFIX).isdigit()]
    return sorted(step for step in steps if (step_path(directory, step) / MANIFEST).exists())


def write(path: epath.Path, content: dict[str, Any]) -> None:
    """Commits the checkpoint at `path`: `content` and the digest of every file, in one atomic rename."""
    part = path / (MANIFEST + ".part")
    part.write_text(json.dumps({**content, "files": digests(path)}, indent=1))
    part.replace(path / MANIFEST)


def read(path: epath.Path) -> dict[str, Any]:
    """The manifest, or {} when there is none that can be read."""
    try:
        content = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def damage(path: epath.Path) -> str:
    """What is wrong with the checkpoint at `path`; "" when every file is there with its digest."""
    manifest = read(path)
    if not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("arrays"), dict):
        return f"{MANIFEST} cannot be read"
    there = digests(path)
    for name, wanted in manifest["files"].items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != wanted:
            return f"{name} has changed since it was written"
    return ""


def digests(path: epath.Path) -> dict[str, list[Any]]:
    """{file: [bytes, SHA-256]} of every file below `path` but the manifest; about 1.8 GB/s on each core."""
    files = [file for file in _files(path) if not file.name.startswith(MANIFEST)]

    def digest(file: epath.Path) -> list[Any]:
        content: Any = file.open("rb")
        with content as f:
            return [file.stat().length, hashlib.file_digest(f, "sha256").hexdigest()]

    with ThreadPoolExecutor(8) as pool:
        return dict(zip((str(f.relative_to(path)) for f in files), pool.map(digest, files)))


def prune(directory: epath.Path, keep: int, keep_best: int) -> None:
    """Deletes all checkpoints but the last `keep` and the `keep_best` with the lowest scores."""
    steps = committed_steps(directory)
    scores = {step: read(step_path(directory, step)).get("score") for step in steps}
    scored = sorted((score, step) for step, score in scores.items() if score is not None)
    kept = {*steps[max(len(steps) - keep, 0) :], *(step for _, step in scored[:keep_best])}
    for step in steps:
        if step not in kept:
            remove(step_path(directory, step))


def remove(path: epath.Path) -> None:
    """Deletes a checkpoint. The manifest goes first: killed half-way, what is left is no checkpoint any more."""
    (path / MANIFEST).unlink(missing_ok=True)
    path.rmtree()


def sweep(directory: epath.Path) -> None:
    """Deletes what killed runs left: half-written and half-deleted checkpoints. Only while nothing is being saved."""
    for path in list(directory.iterdir()) if directory.exists() else ():
        step, temporary, _ = path.name.removeprefix(PREFIX).partition(".orbax-checkpoint-tmp")
        ours = path.name.startswith(PREFIX) and step.isdigit() and path.is_dir()
        if ours and (temporary or not (path / MANIFEST).exists()):
            path.rmtree()


def set_aside(path: epath.Path) -> None:
    """Renames a checkpoint that is in the way of a new one: a damaged one, or one of another history of the run."""
    if path.exists():
        number = 0
        while (aside := path.parent / f"{path.name}.old{number}").exists():
            number += 1
        path.rename(aside)


def _files(path: epath.Path) -> list[epath.Path]:
    out = []
    for entry in path.iterdir():
        out += _files(entry) if entry.is_dir() else [entry]
    return sorted(out)
