"""`python -m moe_jax convert upcycle`: the flags, and what is told."""

import argparse
from pathlib import Path

from moe_jax.commands.conversions.folders import keep_files, new_directory, refuse_filled
from moe_jax.commands.conversions.told import (
    factor_on_moments,
    positive,
    refuse_negative,
    tell_end,
    tell_gap,
)
from moe_jax.errors import UserError
from moe_jax.run import open_run
from moe_jax.runtime import shell
from moe_jax.surgery import snapshot
from moe_jax.surgery.configs import write_file
from moe_jax.surgery.upcycle import Asked, Made, upcycled
from moe_jax.surgery.upcycling import ROUTER_STARTS, Change


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
    refuse_negative("--noise", flags.noise)
    start = flags.router
    if start not in ROUTER_STARTS and positive(start, "normal:") is None:
        raise UserError(f'--router {start}: write "draw", "zeros" or "normal:0.02"')
    change = Change(flags.noise, flags.drop, flags.seed)
    moments = factor_on_moments(flags.optimizer)
    return Asked(flags.changes, flags.every, start, change, moments, flags.restart)


def tell_share(made: Made) -> None:
    """Tells where the hidden units of the dense networks went."""
    moe, share = made.snapshot.config.model.moe, made.share
    parts = [f"{share.shared} hidden units to shared experts"] if share.shared else []
    # Every expert is a copy of the whole rest, ...
    if share.shards == 1:
        parts.append(f"{share.width} to each of {moe.num_experts} experts")
    # ... or of one part of it, ...
    if share.shards > 1:
        parts.append(
            f"{share.shards} shards of {share.width} to {moe.num_experts} experts, in "
            f"{moe.num_experts // share.shards} virtual groups"
        )
    # ... or shared experts have it all.
    if not share.shards:
        parts.append(f"{moe.num_experts} new experts of {share.width} that begin with w_out = 0")
    blocks = ", ".join(map(str, made.blocks))
    shell.tell(f"blocks {blocks}: {'; '.join(parts)}")
