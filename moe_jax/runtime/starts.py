"""Reads the starts of a run from run.json, and whether the code changed between the last two."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read(workdir: Any) -> list[dict[str, Any]]:
    """Returns the records of run.json, one for each start.

    What cannot be read (a full disk empties files) is left out: the list begins anew.
    """
    try:
        found = json.loads((Path(workdir) / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(found, list):
        return []
    return [record for record in found if isinstance(record, dict)]


def changed_code(workdir: Path) -> list[str]:
    """Returns a note when the start that was just recorded has other code than the one before."""
    codes = [code(record) for record in read(workdir)[-2:]]
    if len(set(codes)) < 2:
        return []
    before, now = codes
    return [f"the code has changed since this run was last started: {before} then, {now} now"]


def changed_mesh(workdir: Path) -> list[str]:
    """Returns a note when the start that was just recorded has another mesh than the one before."""
    meshes = [record.get("mesh") for record in read(workdir)[-2:]]
    texts = [_split(lengths) for lengths in meshes if isinstance(lengths, dict)]
    if len(set(texts)) < 2:
        return []
    before, now = texts
    return [f"the mesh was {before} at the last start, it is {now} now"]


def _split(lengths: Mapping[str, int]) -> str:
    """Returns the axes of a mesh that split something, as in "data 2 x expert 4"."""
    return " x ".join(f"{axis} {n}" for axis, n in lengths.items() if n != 1) or "one device"


def code(record: Mapping[str, Any]) -> str:
    """Returns the code of a start: its commit, or without git its version."""
    git, versions = record.get("git"), record.get("versions")
    if isinstance(git, dict) and git.get("commit"):
        return f"commit {str(git['commit'])[:12]}" + (" with changes" if git.get("dirty") else "")
    version = versions.get("moe_jax") if isinstance(versions, dict) else None
    return f"moe_jax {version or 'of an unknown version'}, without git"
