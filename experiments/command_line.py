"""What the command lines of the experiments share: a wrong flag, a wrong directory and Ctrl-C are
one line each.

Exit codes are those of moe_jax: 0 done, 64 a mistake that the message names, 128 + N ended by
signal N (130: Ctrl-C).
"""

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from moe_jax.errors import UserError
from moe_jax.runtime import shell, signals

SMOKE = ".smoke"  # directory of smoke runs in that of --out: no cell can be called so


class Interrupted(Exception):
    """A run was told to end by a signal. It is saved: the same command goes on from there."""

    def __init__(self, signal: int, where: str):
        super().__init__(where)
        self.signal = signal


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are UserErrors. The help shows the whole docstring of the file."""

    def __init__(self, about: str | None):
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


class Flags(Parser):
    """The parser of an experiment, which all can be tried with a few steps."""

    def __init__(self, about: str | None):
        super().__init__(about)
        self.add_argument(
            "--smoke",
            action="store_true",
            help="a few steps of each cell, to see that it works; writes no report",
        )


def hear_signals() -> None:
    """For a process that runs an experiment, before jax is imported, which takes seconds:

    Ctrl-C ends it with one line.
    """
    signals.LISTENER.start()


def launch(work: Callable[[], int | None]) -> int:
    """Exit code of an experiment: a user's mistake is one line, and so is an interruption.

    Between its runs a signal ends it at once; output that nobody reads any more does not end it.
    """
    shell.open_output(lasting=True)
    with signals.listening():
        try:
            return work() or 0
        except UserError as error:
            shell.tell(f"error: {error}", sys.stderr)
            return 64
        except OSError as error:
            shell.tell(f"error: {shell.reason(error)}", sys.stderr)
            return 64
        except Interrupted as stop:
            shell.tell(f"{stop}; the same command goes on from there", sys.stderr)
            return 128 + stop.signal


def made(args: argparse.Namespace) -> Path:
    """The directory of --out, made; of a smoke run an empty one in it.

    UserError where that cannot be, before anything is computed.
    """
    out = args.out / SMOKE if args.smoke else args.out
    try:
        if args.smoke and out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be made or written to ({error.strerror}): choose another directory"
        ) from None
    return out
