"""`python -m moe_jax convert import`: the flags, and what is told."""

import argparse
from pathlib import Path

import jax

from moe_jax.commands.conversions.folders import new_directory, refuse_filled
from moe_jax.errors import UserError
from moe_jax.interchange.importing import import_model
from moe_jax.parallel import mesh
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
    parser.add_argument(
        "--mtp",
        action="store_true",
        help="also the layers that predict further tokens (DeepSeek-V3, GLM-4.5), which train on "
        "with the model and are no part of the text that it writes",
    )
    parser.add_argument(
        "--mesh",
        default="",
        help="DATAxEXPERTxMODEL: put it together on these devices, each its own part (default: in "
        "the memory of the host)",
    )
    parser.add_argument(
        "--simulate_devices", type=int, default=0, help="CPU devices to simulate for --mesh"
    )


def run(flags: argparse.Namespace) -> int:
    """Returns 0; the directory is taken away again when anything fails."""
    if flags.seq_len is not None and flags.seq_len < 1:
        raise UserError(f"--seq_len {flags.seq_len} must be at least 1")
    refuse_filled("--out", flags.out)
    lengths = import_mesh(flags)
    with new_directory(flags.out):
        done = import_model(flags.source, flags.out, flags.seq_len, lengths, flags.mtp)
    model = done.config.model
    shell.tell(
        f"{done.family}: {done.num_tensors:,} tensors, {done.num_parameters:,} parameters in "
        f"{model.param_dtype}, {len(model.blocks)} blocks"
    )
    for note in done.notes:
        shell.tell(note)
    shell.tell(f"written: {flags.out} (train on: --config {flags.out / 'config.py'})")
    return 0


def import_mesh(flags: argparse.Namespace) -> mesh.Lengths | None:
    """Returns the lengths of --mesh; None without one.

    Raises UserError where the devices are not as many.
    """
    if flags.simulate_devices:
        if not flags.mesh:
            raise UserError(
                f"--simulate_devices {flags.simulate_devices} does nothing without --mesh: name a "
                "mesh, as in --mesh 2x2x2"
            )
        mesh.simulate(flags.simulate_devices)
    if not flags.mesh:
        return None
    lengths, there = mesh.parse(flags.mesh, "--mesh"), len(jax.devices())
    if lengths.num_devices != there:
        raise UserError(
            f"--mesh {flags.mesh} has {lengths.num_devices} devices, and there are {there}: name "
            "another, or set --simulate_devices"
        )
    return lengths
