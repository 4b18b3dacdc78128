"""The ledger of runs: what was trained, by which code, on which machine, and how it ended.

    OUT/ledger/HOST.PID.jsonl     one line for each cell that ended, whatever way

Every process writes a file of its own, so that nodes that share a file system never write into one
file. A line has the cell's key, config, study, arm, seed and learning rate, the fingerprint of the
data, commit, machine, exit code, seconds, and the figures. A cell is done when one of its lines has
the exit code 0 and the values that the config has today. A line that a kill cut off is left out.
"""

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax import exit_codes, version
from moe_jax.study.contract import Cell

FOLDER = "ledger"
Line = dict[str, Any]


def write(out: Path, study: str, cell: Cell, code: int, **facts: Any) -> None:
    """Adds the line of a cell that ended. `facts`: figures, or the reason of a failure."""
    source = version.source()
    line = {
        "key": cell.key,
        "config": cell.config,
        "program": cell.program,
        "study": study,
        "arm": cell.arm,
        "seed": cell.seed,
        "rate": cell.rate,
        "exit_code": code,
        "commit": source.commit + (" with changes" if source.dirty else ""),
        "machine": machine(),
        "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    }
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{platform.node()}.{os.getpid()}.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        # A cell takes minutes: its line is on the disk before the next one begins.
        file.flush()
        os.fsync(file.fileno())


def read(out: Path) -> list[Line]:
    """Returns all whole lines, those of one file in the order in which they were written."""
    lines = []
    for path in sorted((out / FOLDER).glob("*.jsonl")):
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                # A kill cut it off; its cell is not done.
                continue
    return lines


def done(lines: list[Line]) -> dict[str, Line]:
    """Returns the last line of every cell that was trained to its end, by its key."""
    return {line["key"]: line for line in lines if line["exit_code"] == exit_codes.DONE}


def find(done: Mapping[str, Line], cell: Cell) -> Line | None:
    """Returns the line of a cell that was trained, or None.

    A key that is new since then has its default in the cell, or else the cell had another key. But
    a default may have changed meanwhile, so every value of the line must be that of the cell.
    """
    line = done.get(cell.key)
    return line if line and _agrees(line.get("config", {}), cell.config) else None


def _agrees(old: Any, new: Any) -> bool:
    """Returns whether all values of `old` are in `new`, by their keys."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return old == new
    return all(key in new and _agrees(value, new[key]) for key, value in old.items())


def failures(lines: list[Line]) -> dict[str, Line]:
    """Returns the last line of every cell that only failed, by its key."""
    finished = done(lines)
    return {line["key"]: line for line in lines if line["key"] not in finished}


def cell_seconds(lines: list[Line]) -> dict[str, float]:
    """Returns the seconds that a cell of each program took, without its compilation."""
    return {line["program"]: line["seconds"] for line in done(lines).values()}


def machine() -> Mapping[str, Any]:
    """Returns what a line says of the machine that trained its cell."""
    return {"node": platform.node(), "cpu": platform.machine(), "cores": os.cpu_count()}
