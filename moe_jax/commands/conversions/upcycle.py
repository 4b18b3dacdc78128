"""`python -m moe_jax convert upcycle`: the flags, and what is told."""

import argparse
from pathlib import Path

import jax

from moe_jax.commands.conversions.folders import keep_files, new_directory, refuse_filled
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.run import open_run
from moe_jax.runtime import shell
from moe_jax.surgery import snapshot
from moe_jax.surgery.configs import write_file
from moe_jax.surgery.upcycle import Asked, Made, upcycled
from moe_jax.surgery.upcycling import ROUTER_STARTS, Change
from moe_jax.surgery.weights import gap

# Two models that differ by less compute the same.
PROMISED = 1e-12


def declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=Path, required=True, help="of the dense run")
    parser.add_argument("--out", type=Path, required=True, help="a new directory, of the run")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument(
        "--every", type=int, default=1, help="every n-th dense block gets experts (default 1: all)"
    )
    parser.add_argument(
        "--router",
        default="draw",
        help='first weights: "draw" as a new model has them (default), "zeros", "normal:STD"',
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, help="added to experts, as a share of their deviation"
    )
    parser.add_argument(
        "--drop",
        type=float,
        default=0.0,
        help="drop-upcycling: the share of each expert's units that are drawn anew",
    )
    parser.add_argument(
        "--optimizer",
        default="copy",
        help='moments of the experts: "copy" those of the dense network (default), "zero", '
        '"scale:X" times X',
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise, drop and router (default 0)")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="without the state of training: a new run begins from the parameters",
    )
    parser.epilog = (
        "--config.KEY=VALUE changes a key of the new config, such as "
        "--config.model.moe.num_experts=8"
    )


def run(flags: argparse.Namespace) -> int:
    """Returns 0; the directory is taken away again when anything fails."""
    asked = asked_for(flags)
    refuse_filled("--out", flags.out)
    old = snapshot.read(open_run(flags.workdir, flags.step))
    made = upcycled(old, asked)
    with new_directory(flags.out):
        snapshot.write(flags.out, made.snapshot)
        keep_files(flags.workdir, flags.out)
        write_file(made.snapshot.raw, flags.out, goes_on=made.snapshot.trains_on)
        tell_share(made)
        tell_gap(old, made.snapshot, made.exact, made.reasons)
    tell_end(flags.out, goes_on=made.snapshot.trains_on)
    return 0


def asked_for(flags: argparse.Namespace) -> Asked:
    """Returns what the flags ask for. Raises UserError for a value that is none."""
    if flags.every < 1:
        raise UserError(f"--every {flags.every} must be at least 1")
    if not 0 <= flags.drop <= 1:
        raise UserError(f"--drop {flags.drop} must lie between 0 and 1: a share of the units")
    if flags.noise < 0:
        raise UserError(f"--noise {flags.noise} must be at least 0")
    start = flags.router
    if start not in ROUTER_STARTS and positive(start, "normal:") is None:
        raise UserError(f'--router {start}: write "draw", "zeros" or "normal:0.02"')
    change = Change(flags.noise, flags.drop, flags.seed)
    moments = factor_on_moments(flags.optimizer)
    return Asked(flags.changes, flags.every, start, change, moments, flags.restart)


def positive(text: str, before: str) -> float | None:
    """Returns the positive number behind a word, as in "normal:0.02"; None where there is none."""
    try:
        value = float(text.removeprefix(before))
    except ValueError:
        return None
    return value if text.startswith(before) and 0 < value < float("inf") else None


def factor_on_moments(text: str) -> float:
    """Returns what moments are multiplied with; 0 = they begin anew. Raises UserError."""
    named = {"copy": 1.0, "zero": 0.0}
    factor = named.get(text, positive(text, "scale:"))
    if factor is None:
        raise UserError(f'--optimizer {text}: write "copy", "zero" or "scale:0.1"')
    return factor


def tell_share(made: Made) -> None:
    """Tells where the hidden units of the dense networks went."""
    moe, share = made.snapshot.config.model.moe, made.share
    parts = [f"{share.shared} hidden units to shared experts"] if share.shared else []
    if share.shards == 1:
        parts.append(f"{share.width} to each of {moe.num_experts} experts")
    if share.shards > 1:
        parts.append(
            f"{share.shards} shards of {share.width} to {moe.num_experts} experts, in "
            f"{moe.num_experts // share.shards} virtual groups"
        )
    if not share.shards:
        parts.append(f"{moe.num_experts} new experts of {share.width} that begin with w_out = 0")
    blocks = ", ".join(map(str, made.blocks))
    shell.tell(f"blocks {blocks}: {'; '.join(parts)}")


def tell_gap(
    old: snapshot.Snapshot,
    new: snapshot.Snapshot,
    exact: snapshot.Arrays,
    reasons: tuple[str, ...],
) -> None:
    """Tells how far the new model is from the old one, and why it is not the same."""
    one = mesh.make(mesh.ONE, jax.devices()[:1])
    with jax.set_mesh(one):
        before = snapshot.weights(old, old.arrays)
        far, dropped = gap(before, snapshot.weights(new, exact))
        stored, _ = gap(before, snapshot.weights(new, new.arrays))
    text = f"largest gap of outputs in float64: {far:.1e}"
    if stored > max(far, PROMISED):
        text += f" (as stored, in {new.config.model.param_dtype}: {stored:.1e})"
    shell.tell(text)
    if far <= PROMISED:
        shell.tell("the new model computes what the old one does")
        return
    if dropped:
        shell.tell(
            f'not the same: dispatcher "{new.config.model.moe.dispatcher}" drops {dropped:.1%} of '
            "the assignments"
        )
    for reason in reasons:
        shell.tell(f"not the same: {reason}")


def tell_end(out: Path, *, goes_on: bool) -> None:
    """Tells how the new run is trained on."""
    workdir = out if goes_on else "NEW"
    shell.tell(
        f"written: {out} (train on: python -m moe_jax.main --config {out / 'config.py'} --workdir "
        f"{workdir})"
    )


