"""Which code runs: the version of the package, and the commit of its source."""

import importlib.metadata
import json
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

__version__ = "0.1.0"


class Source(NamedTuple):
    version: str
    # "" = not known: a copy without its repository.
    commit: str
    # With changes that are in no commit.
    dirty: bool


@cache
def source() -> Source:
    """Returns the code that this process runs, as it was at the first call."""
    state = git_state(Path(__file__).parent) or {"commit": installed_commit(), "dirty": False}
    return Source(__version__, state["commit"], state["dirty"])


def git_state(source: Path) -> dict[str, Any] | None:
    """Returns {"commit", "dirty"} of the repository that tracks `source`; None without one, or
    without git.
    """

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        # without optional locks, a look at the repository never disturbs a commit that is under way
        options = ("--no-optional-locks", "-C", str(source))
        return subprocess.run(
            ["git", *options, *command], capture_output=True, text=True, timeout=30, check=False
        )

    try:
        # an installed copy may lie inside a repository that has nothing to do with it
        if git("ls-files", "--error-unmatch", "__init__.py").returncode:
            return None
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (
        None
        if commit.returncode
        else {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}
    )


def installed_commit() -> str:
    """Returns the commit that pip has noted of a package that it took from a repository (PEP 610);
    "" where it has not.
    """
    try:
        noted = importlib.metadata.distribution("moe_jax").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return json.loads(noted).get("vcs_info", {}).get("commit_id", "") if noted else ""


def made_by() -> dict[str, str]:
    """Returns what a program is made by: the source, Python, and the libraries that compile."""
    code = source()
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return {
        "moe_jax": f"{code.version} {code.commit}{' with changes' if code.dirty else ''}",
        "python": platform.python_version(),
        **packages,
    }
