"""Stand-ins for programs: scripts that are first on PATH."""

import os
import stat
from pathlib import Path


def write(path: Path, text: str) -> Path:
    """Writes a program, and returns its path."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def first_on_path(folder: Path) -> dict[str, str]:
    """The environment in which the programs of a folder come before all others."""
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
