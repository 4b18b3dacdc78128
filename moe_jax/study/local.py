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
    found = json.loads(path.read_text())
    return found["study"], expand.from_json(found["cells"])


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
            while waiting and len(running) < at_once:
                number, pack = waiting.pop(0)
                path = out / "packs" / f"{study}.{number}.json"
                write_pack(path, study, pack)
                running.append((subprocess.Popen([*command, str(path)]), pack))
            time.sleep(POLL)
            for each in [each for each in running if each[0].poll() is not None]:
                running.remove(each)
                note_lost(out, study, each[1], each[0].returncode)


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
        for process, _ in running:
            process.terminate()
        for process, _ in running:
            process.wait()
