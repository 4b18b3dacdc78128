"""Programs that tests start: stand-ins that are first on PATH, and packages of the system."""

import contextlib
import os
import shutil
import stat
import subprocess
from pathlib import Path


def write(path: Path, text: str) -> Path:
    """Writes a program, and returns its path."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def first_on_path(folder: Path) -> dict[str, str]:
    """The environment in which the programs of a folder come before all others."""
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def missing(program: str, *packages: str) -> str:
    """Returns why a program is not here; "" when it is.

    Installs the packages where nobody's own machine is changed by it: as root, or on one of CI.
    """
    if shutil.which(program):
        return ""
    needs = f"{program} is not installed: apt-get install {' '.join(packages)}"
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (root and not os.environ.get("CI")):
        return needs
    install = ["apt-get", "install", "-y", "-q", "-o", "DPkg::Lock::Timeout=300"]
    install += ["--no-install-recommends", *packages]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        for command in (["apt-get", "update", "-q"], install):
            subprocess.run([*root, *command], capture_output=True, timeout=400, check=False)
    return "" if shutil.which(program) else needs
