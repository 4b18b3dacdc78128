"""Plans a training run for hardware that is not there: the real step is compiled for it.

    python -m moe_jax plan --config debug --topology cpu:8
    python -m moe_jax plan --config olmoe_1b7b --topology v5p:4x4x4 --mesh 8x8x1 --mesh 64x1x1
    python -m moe_jax plan --config olmoe_1b7b --topology h100:8x8 --search

A topology is `cpu:8`, a TPU slice (`v5e:4x4`, `v5p:8x8x8`, `v6e:16x16`, `tpu7x:4x4x4`), several
slices (`2*v5e:4x4`), or hosts x GPUs (`h100:8x8`, `h200`, `b200`, `a100`). docs/plan.md tells how
to read the tables.

Exit codes: 0 every plan fits, 1 one does not fit into the memory of a device, 64 a mistake that the
message names.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Group

from moe_jax import config
from moe_jax.config import command_line
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.plan import as_json, card_tables, search, topology
from moe_jax.plan.card import Card, card
from moe_jax.plan.compiling import TooLarge
from moe_jax.runtime import shell
from moe_jax.terminal import working


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax plan", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--topology", required=True, help="cpu:8, v5e:4x4, 2*v5p:4x4x4, h100:8x8")
    parser.add_argument(
        "--mesh",
        action="append",
        default=[],
        help="DATAxEXPERTxMODEL; may be given several times; default: that of the config",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, rematerialisation and dispatchers, and rank those that fit",
    )
    parser.add_argument(
        "--best", type=int, default=3, help="plans of --search that are compiled (default 3)"
    )
    parser.add_argument("--out", type=Path, help="file for the plans as JSON")
    return command_line.parse(parser, argv)


def main(argv: list[str]) -> int:
    """Prints the plans of a config on a topology, and returns the exit code."""
    flags = parse(argv)
    if flags.search and flags.mesh:
        raise UserError("--search chooses the mesh: leave --mesh away, or --search")
    raw = command_line.read(flags.config, flags.changes)
    config.allow_float64(raw)
    devices = topology.devices(topology.parse(flags.topology))
    if flags.search:
        plans, refused = _searched(raw, flags.topology, devices, flags.best)
    else:
        plans, refused = _planned(raw, flags.mesh or [""], devices)
    for reason in refused:
        shell.tell(f"error: {reason}", sys.stderr)
    if flags.out:
        cards = [as_json.of_card(one) for one in plans]
        found = {"topology": flags.topology, "plans": cards, "refused": refused}
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if refused or any(one.fits is False for one in plans) else 0


def _planned(
    raw: dict[str, Any], meshes: Sequence[str], devices: Any
) -> tuple[list[Card], list[str]]:
    """Compiles the step of a config on each mesh, and prints the cards.

    Returns them, and why the compiler refused the others.
    """
    plans, refused = [], []
    for lengths in meshes:
        try:
            plans.append(_compiled(raw, lengths, devices))
        except TooLarge as reason:
            refused.append(str(reason))
    return plans, refused


def _compiled(raw: dict[str, Any], lengths: str, devices: Any) -> Card:
    """Compiles the step of a config on one mesh, and prints its card."""
    if lengths:
        raw = {**raw, "mesh": mesh.parse(lengths, "--mesh").written()}
    cfg = config.build(raw, len(devices))
    with jax.set_mesh(mesh.make(cfg.mesh, devices, cfg.mesh_slow_axis)):
        with working.shown("plan") as tell:
            tell(f"compiling the step for {len(devices)} devices, mesh {cfg.mesh}")
            found = card(cfg)
    shell.console().print(card_tables.render(found), highlight=False)
    return found


def _searched(
    raw: dict[str, Any], where: str, devices: Any, number: int
) -> tuple[list[Card], list[str]]:
    """Ranks candidates by an estimate, compiles the best of them, and prints both tables.

    Returns the cards, and why the compiler refused the others.
    """
    with working.shown("plan") as tell:
        tell("estimating every mesh")
        ranked = search.rank(raw, where, devices)
        tell(f"compiling the best {number} of {len(ranked)}")
        compiled, refused = search.compile_best(ranked, devices, number)
    console = shell.console()
    parts = [search.estimates_table(ranked), "", search.compiled_table(compiled)]
    console.print(Group(*parts), highlight=False)
    return [found for _, found in compiled], refused
