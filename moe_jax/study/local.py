"""Packs of cells in processes of this machine.

Every pack is a process of its own: one that is killed (memory, a fault in compiled code) takes no
other pack with it, and its cells get a line in the ledger with its exit code.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_jax import exit_codes
from moe_jax.runtime import shell
from moe_jax.study import expand, ledger
from moe_jax.study.contract import Cell

POLL = 0.2  # seconds


def write_pack(path: Path, study: str, pack: Sequence[Cell]) -> None:
    """Writes a pack for the process that will train it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"study": study, "cells": expand.as_json(list(pack))}))


def read_pack(path: Path) -> tuple[str, list[Cell]]:
    """Returns the study and the cells of a pack."""
    content = json.loads(path.read_text())
    return content["study"], expand.from_json(content["cells"])


def run(
    packs: Sequence[Sequence[Cell]], study: str, out: Path, command: Sequence[str], at_once: int
) -> None:
    """Trains packs, `at_once` of them at a time, and returns when all have ended.

    Args:
      command: a command line that trains the pack whose file follows it.
    """
    waiting = list(enumerate(packs))
    running: list[tuple[subprocess.Popen, Sequence[Cell]]] = []
    with _ended(running):
        while waiting or running:
            # 1. A free place takes the next pack.
            while waiting and len(running) < at_once:
                number, pack = waiting.pop(0)
                path = out / "packs" / f"{study}.{number}.json"
                write_pack(path, study, pack)
                process = subprocess.Popen([*command, str(path)])
                running.append((process, pack))
            time.sleep(POLL)
            # 2. Those that have ended leave theirs. A copy of the list, for it changes.
            for process, pack in list(running):
                if process.poll() is None:
                    continue
                running.remove((process, pack))
                note_lost(out, study, pack, process.returncode)


def note_lost(out: Path, study: str, pack: Sequence[Cell], code: int) -> None:
    """Writes a line for the cells of a process that ended without one, because it was killed."""
    if code == exit_codes.DONE:
        return
    known = {line["key"] for line in ledger.read(out)}
    lost = [cell for cell in pack if cell.key not in known]
    if lost:
        shell.tell(f"a process ended with exit code {code}: {len(lost)} cells are lost", sys.stderr)
    for cell in lost:
        ledger.write(out, study, cell, code or exit_codes.INTERNAL, reason="its process ended")


@contextmanager
def _ended(running: list[tuple[subprocess.Popen, Sequence[Cell]]]) -> Iterator[None]:
    """Ends the processes that are still running when the block is left by an exception."""
    try:
        yield
    finally:
        # All are told before the first is waited for, so that they end side by side.
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.wait()
