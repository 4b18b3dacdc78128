"""`python -m moe_jax convert import`: the flags, and what is told."""

import argparse
from pathlib import Path

from moe_jax.commands.conversions.folders import new_directory, refuse_filled
from moe_jax.errors import UserError
from moe_jax.interchange.importing import import_model
from moe_jax.runtime import shell


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        help="a folder with config.json and safetensors, as save_pretrained writes it",
    )
    parser.add_argument("--out", type=Path, required=True, help="a new directory, of the run")
    parser.add_argument(
        "--seq_len",
        type=int,
        help="tokens of a row (default: max_position_embeddings, at most 4096)",
    )


def run(flags: argparse.Namespace) -> int:
    """Returns 0; the directory is taken away again when anything fails."""
    if flags.seq_len is not None and flags.seq_len < 1:
        raise UserError(f"--seq_len {flags.seq_len} must be at least 1")
    refuse_filled("--out", flags.out)
    with new_directory(flags.out):
        done = import_model(flags.source, flags.out, flags.seq_len)
    model = done.config.model
    shell.tell(
        f"{done.family}: {done.num_tensors:,} tensors, {done.num_parameters:,} parameters in "
        f"{model.param_dtype}, {len(model.blocks)} blocks"
    )
    for note in done.notes:
        shell.tell(note)
    shell.tell(f"written: {flags.out} (train on: --config {flags.out / 'config.py'})")
    return 0
