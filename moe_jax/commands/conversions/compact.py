"""`python -m moe_jax convert compact`: the flags, and what is told."""

import argparse
from pathlib import Path

import jax

from moe_jax import checkpoint
from moe_jax.commands.conversions.folders import keep_files, new_directory, refuse_filled
from moe_jax.errors import UserError
from moe_jax.moe import sparse
from moe_jax.moe.sparse import compact
from moe_jax.parallel import mesh
from moe_jax.run import open_run, write_run
from moe_jax.runtime import shell
from moe_jax.surgery.compacting import FORMATS, Asked, shrunk
from moe_jax.surgery.weights import Weights, compare, parameters_of, read

# How far outputs may move, relative to the largest.
LIMIT = 1e-6


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of the run that trained the model"
    )
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="auto",
        help="of the experts: whole matrices, blocks (for inference alone), or blocks where they "
        "are faster (default)",
    )
    parser.add_argument(
        "--block", type=int, default=0, help="side of a block (default: that of the pattern blocks)"
    )


def run(flags: argparse.Namespace) -> int:
    """Returns 0, or 1 when the outputs moved too far."""
    refuse_filled("--out", flags.out)
    if flags.block and flags.format == "dense":
        raise UserError(
            f"--format dense writes whole matrices, so --block {flags.block} would do nothing: "
            "leave one out"
        )
    with jax.set_mesh(mesh.make(mesh.ONE, jax.devices()[:1])):
        old = read(open_run(flags.workdir, flags.step))
        notes, new = shrunk(old, Asked(flags.workdir, flags.format, flags.block))
        deviation = written(old, new, flags)
    report(old, new, notes, flags)
    shell.tell(
        f"outputs on random inputs: largest deviation {deviation:.1e} of the largest output, "
        f"float32 (limit {LIMIT:.0e})"
    )
    if deviation > LIMIT:
        shell.tell(f"{flags.out} does not compute the same: do not use it")
        return 1
    shell.tell(f"written: {flags.out}")
    return 0


def written(old: Weights, new: Weights, flags: argparse.Namespace) -> float:
    """Writes --out, and returns the deviation of what it holds then.

    It is taken away again when anything fails, for nobody has compared it.
    """
    with new_directory(flags.out):
        write_run(flags.out, new.raw, jax.tree.map(jax.numpy.asarray, new.parts), new.step)
        keep_files(flags.workdir, flags.out)
        # Read from the disk: what is compared is what others will read.
        return compare(old, read(open_run(flags.out, silent=True)))


def report(old: Weights, new: Weights, notes: list[str], flags: argparse.Namespace) -> None:
    """Tells what was done, and how much smaller the model is."""
    for note in notes:
        shell.tell(note)
    kept, every = compact.nonzero(layer for _, layer in sparse.experts_of(old.parts["params"]))
    shell.tell(f"experts: {kept:,} of {every:,} weights were not zero ({kept / every:.1%})")
    before, after = parameters_of(old), parameters_of(new)
    shell.tell(f"parameters: {before:,} -> {after:,} ({after / before:.1%})")
    before, after = bytes_of(flags.workdir, old.step), bytes_of(flags.out, new.step)
    shell.tell(f"checkpoint on disk, optimizer included before: {before:,} -> {after:,} bytes")


def bytes_of(workdir: Path, step: int) -> int:
    saves = checkpoint.Checkpoints(workdir / "checkpoints", every=0, keep=1, keep_best=0)
    files = [path for path in Path(saves.path(step)).rglob("*") if path.is_file()]
    return sum(file.stat().st_size for file in files)
