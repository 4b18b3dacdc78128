"""`python -m moe_jax convert export`: the flags, and what is told."""

import argparse
from pathlib import Path

import jax

from moe_jax.commands.conversions.folders import new_directory, refuse_filled
from moe_jax.errors import UserError
from moe_jax.interchange.exporting import DTYPES, export_model
from moe_jax.interchange.families import FAMILIES
from moe_jax.parallel import mesh
from moe_jax.run import open_run
from moe_jax.runtime import shell


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of the run that trained the model"
    )
    parser.add_argument("--to", type=Path, required=True, help="a new directory")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument(
        "--family",
        choices=tuple(FAMILIES),
        default="",
        help="of models (default: the first that can express the run)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="", help="of the tensors (default: of the parameters)"
    )
    parser.add_argument(
        "--like",
        type=Path,
        help="the folder of the model that the run began from: its tokenizer, chat template and "
        "ids of special tokens are taken",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="the parameters themselves, not their moving average (optim.ema_decay)",
    )
    parser.add_argument(
        "--shard_mb", type=int, default=1000, help="MB of a file, at most (default 1000)"
    )


def run(flags: argparse.Namespace) -> int:
    """Returns 0; the directory is taken away again when anything fails."""
    if flags.shard_mb < 1:
        raise UserError(f"--shard_mb {flags.shard_mb} must be at least 1")
    refuse_filled("--to", flags.to)
    trained = open_run(flags.workdir, flags.step)
    if flags.raw and not trained.config.optim.ema_decay:
        raise UserError(
            "--raw: the run kept no moving average of its parameters (optim.ema_decay = 0): leave "
            "the flag out"
        )
    with new_directory(flags.to), jax.set_mesh(mesh.of_host()):
        done = export_model(
            trained,
            flags.to,
            family=flags.family,
            dtype=flags.dtype,
            like=flags.like,
            raw=flags.raw,
            shard_bytes=flags.shard_mb * 10**6,
        )
    shell.tell(f"{done.family}: {done.num_tensors:,} tensors, {done.num_bytes:,} bytes")
    for note in done.notes:
        shell.tell(note)
    shell.tell(f"written: {flags.to}")
    return 0
