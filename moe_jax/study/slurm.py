"""Packs of cells as an array of jobs of SLURM: one job for each pack.

The jobs write their own files of the ledger, so the folder of --out lies on a file system that the
nodes share. `sbatch` returns at once; the same command again goes on with what is known by then.
"""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.study.contract import Cell
from moe_jax.study.local import write_pack


def submit(
    packs: Sequence[Sequence[Cell]],
    study: str,
    out: Path,
    command: Sequence[str],
    options: Sequence[str],
) -> str:
    """Submits the packs and returns what sbatch said.

    Args:
      command: a command line that trains the pack whose file follows it.
      options: further flags of sbatch, such as --partition=gpu.

    Raises UserError where there is no sbatch, or where it refuses.
    """
    folder = out.resolve() / "slurm" / study
    for number, pack in enumerate(packs):
        write_pack(folder / f"{number}.json", study, pack)
    words = shlex.join(command)
    script = f"#!/bin/bash\nexec {words} {shlex.quote(str(folder))}/$SLURM_ARRAY_TASK_ID.json\n"
    path = folder / "pack.sbatch"
    path.write_text(script)
    words = [
        "sbatch",
        f"--job-name={study}",
        f"--array=0-{len(packs) - 1}",
        f"--output={folder}/%a.log",
        *options,
        str(path),
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("--slurm: there is no sbatch here; --local N trains on this machine") from (
            None
        )
    if done.returncode:
        raise UserError(f"--slurm: sbatch refuses: {done.stderr.strip()}")
    return done.stdout.strip()
