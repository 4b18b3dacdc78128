"""Checks the files of a run, and repairs what can be.

    python -m moe_jax fsck runs/x
    python -m moe_jax fsck runs/x --repair

Every file of every checkpoint is read and compared with its digest, as a restart does with the
newest one alone. Without --repair nothing is changed. With it

    a damaged checkpoint     is renamed to step_N.damagedK: nothing reads it, and nothing is lost
    what a kill half-wrote   is deleted, where the run itself left a mark that it was writing it
    a torn row of figures    is cut off metrics.jsonl: the run writes it again

Exit codes: 0 all is well, or was repaired; 1 something is wrong, and was left as it is; 64 a
mistake that the message names; 77 there are checkpoints, and none of them is whole.
"""

import argparse
import json
import os
from pathlib import Path
from typing import NamedTuple

from moe_jax import exit_codes
from moe_jax.checkpoint import folder, manifest
from moe_jax.errors import UserError
from moe_jax.runtime import shell
from moe_jax.terminal import working

JSON_FILES = ("config.json", "run.json", "summary.json")


class Found(NamedTuple):
    """A fault of a run."""

    path: Path
    what: str
    # What --repair makes of it; "" = nothing can be done.
    repair: str


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax fsck",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="the --workdir of a run")
    parser.add_argument("--repair", action="store_true", help="repair what can be repaired")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    return shell.run_command(work, argv)


def work(argv: list[str]) -> int:
    flags = parse(argv)
    workdir = Path(flags.run)
    if not workdir.is_dir():
        raise UserError(f"{workdir} is no directory: name the --workdir of a run")
    if not flags.repair:
        return check(workdir, repairs=False)
    # A run that is under way writes there.
    with shell.held(workdir, "fsck --repair"):
        return check(workdir, repairs=True)


def check(workdir: Path, *, repairs: bool) -> int:
    """Prints what is wrong in a run, and repairs it where asked. Returns the exit code."""
    directory = workdir / "checkpoints"
    steps = folder.committed_steps(directory)
    # 1. Every checkpoint is read. What is wrong with it, by its step.
    damaged: dict[int, str] = {}
    with working.shown("fsck") as tell:
        for step in steps:
            tell(f"reading step {step}")
            what = manifest.damage(folder.step_path(directory, step))
            if what:
                damaged[step] = what
    sound = [step for step in steps if step not in damaged]
    names = ", ".join(map(str, sound)) or "none"
    print(f"whole checkpoints: {names}")
    # 2. All faults are told.
    found = []
    for step, what in damaged.items():
        # With none left the next start would begin anew, without a word: that is the user's to say.
        found.append(Found(folder.step_path(directory, step), what, "renamed" if sound else ""))
    for path in ruins(directory):
        found.append(Found(path, "half-written or half-deleted", "deleted"))
    found += torn_rows(workdir / "metrics.jsonl")
    found += unreadable(workdir)
    for fault in found:
        becomes = fault.repair or "it stays as it is"
        if fault.repair and not repairs:
            becomes = f"with --repair it is {fault.repair}"
        print(f"{fault.path}: {fault.what}; {becomes}")
    # 3. And repaired.
    if repairs:
        for step in damaged if sound else ():
            folder.set_aside(folder.step_path(directory, step), "damaged")
        folder.sweep(directory)
        cut_torn_rows(workdir / "metrics.jsonl")
    if steps and not sound:
        print(f"no checkpoint is whole: this run cannot go on. Move {directory} away to begin anew")
        return exit_codes.NO_CHECKPOINT
    left = [fault for fault in found if fault.repair and not repairs]
    if not found:
        print(f"all is well in {workdir}")
    return 1 if left else exit_codes.DONE


def ruins(directory: Path) -> list[Path]:
    """Returns what a killed run left half-written or half-deleted, by the marks beside it."""
    return [path for path in folder.marked(directory) if os.path.lexists(path)]


def torn_rows(path: Path) -> list[Found]:
    """Returns the fault of a metrics.jsonl with a last line that is no row; none if it is whole."""
    end = whole_until(path)
    if end is None:
        return []
    return [Found(path, f"its last row is torn, from byte {end} on", "cut off")]


def whole_until(path: Path) -> int | None:
    """Returns the bytes before a torn last row; None when the last row is whole."""
    if not path.is_file():
        return None
    rows = path.read_bytes().rstrip(b"\n")
    # Of one row alone, the row: then nothing stands before it.
    before, newline, last = rows.rpartition(b"\n")
    if not last:
        return None
    try:
        json.loads(last)
    except ValueError:
        return len(before + newline)
    return None


def cut_torn_rows(path: Path) -> None:
    """Cuts a torn last row off a file; the run writes it again."""
    end = whole_until(path)
    if end is not None:
        os.truncate(path, end)


def unreadable(workdir: Path) -> list[Found]:
    """Returns the files of a run that should be JSON and are not. A restart writes them anew."""
    found = []
    for name in JSON_FILES:
        path = workdir / name
        if not path.exists():
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found.append(
                Found(path, "it cannot be read as JSON; the next start writes it anew", "")
            )
    return found
