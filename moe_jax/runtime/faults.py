"""Faults that happen on purpose, to see what a run, a launcher or a cluster does about them.

`--config.faults="kill@12:1"` kills process 1 before step 12. Several faults are parted by commas:

    KIND@STEP[:PROCESS]

    kill    SIGKILL: the process is gone without a word
    stop    SIGSTOP: it lives, and nothing in it moves
    hang    its main thread sleeps for ever, as on a file system that hangs
    raise   an exception that nobody expects
    term    SIGTERM, as a cluster sends before the time is up
    int     SIGINT, as Ctrl-C does

A fault without a process happens in all of them. It happens once in the life of a workdir: the run
that goes on after it does not meet it again.
"""

import os
import re
import signal
import time
from pathlib import Path
from typing import NamedTuple

from moe_jax.errors import UserError

SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
}
KINDS = (*SIGNALS, "hang", "raise")


class Fault(NamedTuple):
    """A fault before a step."""

    kind: str
    step: int
    # None = all of them.
    process: int | None

    def __str__(self) -> str:
        return f"{self.kind}@{self.step}" + ("" if self.process is None else f":{self.process}")


class Injected(RuntimeError):
    """The exception of the fault "raise"."""


def parse(text: str, path: str) -> tuple[Fault, ...]:
    """Returns the faults of a config key. Raises UserError for what is none."""
    faults = []
    for word in str(text).replace(" ", "").split(","):
        if not word:
            continue
        match = re.fullmatch(rf"({'|'.join(KINDS)})@(\d+)(?::(\d+))?", word)
        if not match:
            raise UserError(
                f'{path} = "{text}": {word!r} is no fault. Write KIND@STEP or KIND@STEP:PROCESS, '
                f"with one of {', '.join(KINDS)}"
            )
        kind, step, process = match.groups()
        faults.append(Fault(kind, int(step), None if process is None else int(process)))
    return tuple(faults)


class Injector:
    """Makes the faults of a run happen in this process.

    Args:
      faults: of the config.
      workdir: where it is noted which of them have happened.
      process: number of this one.
    """

    def __init__(self, faults: tuple[Fault, ...], workdir: Path, process: int):
        self._mine = [fault for fault in faults if fault.process in (None, process)]
        self._workdir, self._process = workdir, process

    def before(self, step: int) -> None:
        """Makes the fault of this step happen."""
        for fault in self._mine:
            noted = self._workdir / "faults" / f"{fault}.process_{self._process}"
            # The note is in the workdir, so a run that goes on does not meet the fault again.
            if fault.step != step or noted.exists():
                continue
            # Noted first: a process that is killed could not do it afterwards.
            noted.parent.mkdir(parents=True, exist_ok=True)
            noted.touch()
            _happen(fault)


def _happen(fault: Fault) -> None:
    """Makes one fault happen now."""
    if fault.kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.kind])
    elif fault.kind == "raise":
        raise Injected(f"config.faults: {fault}")
    # Other threads go on: what watches the run must find it.
    while fault.kind == "hang":
        time.sleep(1.0)
