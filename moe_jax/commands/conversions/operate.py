"""`python -m moe_jax convert surgery OPERATION`: the flags, and what is told."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_jax.commands.conversions.folders import keep_files, new_directory, refuse_filled
from moe_jax.commands.conversions.told import (
    factor_on_moments,
    refuse_negative,
    tell_end,
    tell_gap,
)
from moe_jax.errors import UserError
from moe_jax.run import Run, open_run
from moe_jax.runtime import shell
from moe_jax.surgery import loads, operations, snapshot
from moe_jax.surgery.configs import write_file
from moe_jax.surgery.operate import Asked, operated
from moe_jax.surgery.operations import Plan, There


class Operation(NamedTuple):
    """Holds what the command knows of an operation."""

    about: str
    declare: Callable[[argparse.ArgumentParser], None]
    # (what is there, flags) -> the plan.
    plan: Callable[[There, argparse.Namespace], Plan]
    # Flags -> whether loads must be counted.
    needs_load: Callable[[argparse.Namespace], bool]
    # Some experts become copies, which noise tells from their parents.
    copies: bool = False


def numbers(text: str) -> list[int]:
    """Returns the experts of "3,1,0"."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write numbers, as in 3,1,0") from None


def groups(text: str) -> list[list[int]]:
    """Returns the groups of experts of "0+1,2+5+6"."""
    return [numbers(group.replace("+", ",")) for group in text.split(",")]


def number(least: int) -> Callable[[str], int]:
    """Returns a reader of whole numbers from `least` on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: write a whole number from {least} on")
        return int(text)

    return read


def declare_permute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--order", type=numbers, help="the old number of each, as in 3,1,0,2 (default: drawn)"
    )


def declare_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", type=number(2), required=True, help="of each expert")
    parser.add_argument(
        "--how",
        choices=("slices", "copies"),
        default="slices",
        help="slices of its hidden units (default), or whole copies",
    )


def declare_grow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=number(1), required=True, help="experts of a layer")
    parser.add_argument("--like", type=numbers, help="those to copy (default: the busiest)")


def declare_prune(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--experts", type=numbers, help="those that go, in every layer")
    chosen.add_argument("--keep", type=number(1), help="the busiest of each layer that stay")


def declare_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--groups", type=groups, required=True, help="what becomes one each, as in 0+1,2+5+6"
    )
    parser.add_argument(
        "--weights",
        choices=("mean", "load"),
        default="mean",
        help="of the experts of a group (default mean)",
    )


def declare_revive(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--experts", type=numbers, help="the dead ones, in every layer")
    chosen.add_argument(
        "--below", type=float, help="dead is what has less than so many times the mean load"
    )


def _always(flags: argparse.Namespace) -> bool:
    del flags
    return True


def _never(flags: argparse.Namespace) -> bool:
    del flags
    return False


def _grow_asks(flags: argparse.Namespace) -> bool:
    return flags.like is None


def _prune_asks(flags: argparse.Namespace) -> bool:
    return flags.experts is None


def _merge_asks(flags: argparse.Namespace) -> bool:
    return flags.weights == "load"


def _permute(there: There, flags: argparse.Namespace) -> Plan:
    return operations.permute(there, flags.order, flags.seed)


def _split(there: There, flags: argparse.Namespace) -> Plan:
    return operations.split(there, flags.parts, flags.how)


def _grow(there: There, flags: argparse.Namespace) -> Plan:
    return operations.grow(there, flags.to, flags.like)


def _prune(there: There, flags: argparse.Namespace) -> Plan:
    return operations.prune(there, flags.experts, flags.keep)


def _merge(there: There, flags: argparse.Namespace) -> Plan:
    return operations.merge(there, flags.groups, flags.weights == "load")


def _revive(there: There, flags: argparse.Namespace) -> Plan:
    return operations.revive(there, flags.experts, flags.below)


OPERATIONS: dict[str, Operation] = {
    "permute": Operation("give experts other numbers", declare_permute, _permute, _never),
    "split": Operation("make several of each expert", declare_split, _split, _never),
    "grow": Operation("add experts", declare_grow, _grow, _grow_asks, copies=True),
    "prune": Operation("take experts away", declare_prune, _prune, _prune_asks),
    "merge": Operation("make one expert of several", declare_merge, _merge, _merge_asks),
    "revive": Operation(
        "make copies of busy experts of dead ones", declare_revive, _revive, _always, copies=True
    ),
}


def declare(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="operation", required=True)
    for name, operation in OPERATIONS.items():
        own = kinds.add_parser(name, help=operation.about, description=operation.about)
        own.add_argument("--workdir", type=Path, required=True, help="of the run")
        own.add_argument("--out", type=Path, required=True, help="a new directory, of the new run")
        own.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
        operation.declare(own)
        own.add_argument(
            "--optimizer",
            default="copy",
            help='moments of experts that are not as they were: "copy" (default), "zero", '
            '"scale:X" times X',
        )
        own.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
        if operation.copies:
            own.add_argument(
                "--noise",
                type=float,
                default=0.01,
                help="on the copies, as a share of the weights' deviation (default 0.01)",
            )
        own.add_argument(
            "--batches",
            type=number(0),
            default=8,
            help="held-out batches on which loads are counted; 0 = all (default 8)",
        )


def run(flags: argparse.Namespace) -> int:
    """Returns 0; the directory is taken away again when anything fails."""
    operation = OPERATIONS[flags.operation]
    noise = flags.noise if operation.copies else 0.0
    refuse_negative("--noise", noise)
    asked = Asked(noise, flags.seed, factor_on_moments(flags.optimizer))
    refuse_filled("--out", flags.out)
    trained = open_run(flags.workdir, flags.step)
    model = trained.config.model
    if not model.num_moe_layers:
        raise UserError(f"{flags.workdir} has no experts: `convert upcycle` makes some")
    # Counting takes a pass over held-out rows, so it is done only for what asks for it.
    load = count(trained, flags.batches) if operation.needs_load(flags) else None
    plan = operation.plan(There(model.num_moe_layers, model.moe.num_experts, load), flags)
    old = snapshot.read(trained)
    done = operated(old, plan, asked)
    new = done.snapshot
    with new_directory(flags.out):
        snapshot.write(flags.out, new)
        keep_files(flags.workdir, flags.out)
        write_file(new.raw, flags.out, goes_on=new.trains_on)
        tell_plan(plan, model.moe.num_experts)
        for name in done.anew:
            shell.tell(f"{name} begins anew: it is no array of one expert each")
        tell_gap(old, new, done.exact, done.reasons)
    tell_end(flags.out, goes_on=new.trains_on)
    return 0


def count(trained: Run, batches: int) -> np.ndarray:
    """Returns the loads of experts, and tells them."""
    load_LE = loads.counted(trained, batches)
    for layer, load_E in enumerate(load_LE):
        share_E = load_E / max(load_E.sum(), 1)
        shell.tell(f"layer {layer}: load {' '.join(f'{share:.1%}' for share in share_E)}")
    return load_LE


def tell_plan(plan: Plan, before: int) -> None:
    """Tells where the experts come from."""
    num_after = plan.index.shape[1]
    shell.tell(f"experts of a layer: {before} -> {num_after}")
    for layer, index in enumerate(plan.index):
        shell.tell(f"layer {layer}: from {','.join(map(str, index))}")
