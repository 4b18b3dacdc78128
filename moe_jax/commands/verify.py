"""Proves that a config computes the same on every mesh, in float64, on simulated devices;
docs/verify.md tells how to read the table.

    python -m moe_jax verify --config quickstart
    python -m moe_jax verify --config debug --config.model.moe.dispatcher=capacity \
        --meshes 2x2x2,1x8x1 --processes 2

Exit codes: 0 proven, 1 something deviates (the verdict says what and where first), 64 a mistake
that the message names.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from moe_jax.config import command_line
from moe_jax.errors import UserError
from moe_jax.parallel import mesh
from moe_jax.runtime import shell
from moe_jax.terminal import working
from moe_jax.terminal.table import Table, names, numbers, prose
from moe_jax.verify import certificate, shrink
from moe_jax.verify.alone import Check
from moe_jax.verify.compare import LIMITS
from moe_jax.verify.run import Result, Row, Wanted, default_meshes, prove
from moe_jax.verify.tables import judged, number

COLUMNS = {
    "forward": "loss",
    "tokens": "token",
    "counts": "counts",
    "drops": "drops",
    "sums": "stats",
    "gradients": "gradient",
    "state": "params",
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax verify", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--meshes",
        help="DATAxEXPERTxMODEL or STAGExDATAxEXPERTxSEQxMODEL,... of up to 32 devices; default: "
        "all ten of 8 with three numbers, and some that split rows or layers, where the config "
        "can have them",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="2, 4 or 8: also as many real processes, which share the mesh that splits most",
    )
    parser.add_argument(
        "--steps", type=int, default=5, help="optimizer steps that are compared (default 5)"
    )
    parser.add_argument(
        "--float32", action="store_true", help="float32 on every mesh, not only on the widest"
    )
    parser.add_argument(
        "--certificate",
        type=Path,
        help="file for what was proven: JSON, or Markdown if it ends in .md",
    )
    return command_line.parse(parser, argv)


def main(argv: list[str]) -> int:
    """Proves a config, prints what was compared, and returns the exit code."""
    start = time.monotonic()
    args, console = parse(argv), shell.console()
    raw = command_line.read(args.config, args.changes)
    shapes = meshes(args.meshes, raw)
    # Whatever can be wrong is said before minutes are spent.
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    if args.processes not in (1, 2, 4, 8):
        raise UserError(f"--processes {args.processes} must be one of 1, 2, 4, 8")
    if args.certificate:
        certificate.refuse_unwritable(args.certificate)
    wanted = Wanted(shapes, args.steps, args.processes, args.float32)
    with working.shown("verify") as tell:
        result = prove(raw, wanted, tell)
    text = verdict(result)
    console.print(rules_table(result.rules), "", meshes_table(result))
    for row in result.rows:
        # A refusal is no fault.
        if row.refused:
            console.print(f"{row.name}: {row.refused}", style="dim", markup=False)
        elif row.failure:
            console.print(f"{row.name}: {row.failure}", style="red", markup=False)
    for note in result.notes:
        console.print(note, style="dim", markup=False, highlight=False)
    console.print("", alone_table(result.alone), "")
    colour, seconds = "green" if result.proven else "red", time.monotonic() - start
    console.print(f"[bold {colour}]{text}[/] ({seconds:.0f} s)")
    if args.certificate:
        content = certificate.content(raw, str(args.config), args.changes, result, text)
        certificate.write(args.certificate, content)
        console.print(f"certificate: {args.certificate}")
    return 0 if result.proven else 1


def meshes(text: str | None, raw: Mapping[str, Any]) -> list[mesh.Lengths]:
    """Returns the meshes that the flag names, or those that suit the config."""
    if text is None:
        return default_meshes(raw)
    # A mesh that is named twice is proven once.
    return list(dict.fromkeys(mesh.parse(part, "--meshes") for part in text.split(",")))


def verdict(result: Result) -> str:
    """Returns one line: proven, or what deviates and where first."""
    ran = [row for row in result.rows if not row.refused]
    wrong = [check for check in result.alone if not check.sound]
    if result.proven:
        refused = len(result.rows) - len(ran)
        more = f"; {refused} refused, for the reason above" if refused else ""
        steps = "1 step" if result.steps == 1 else f"{result.steps} steps"
        return f"PROVEN: {len(ran)} layouts equal one device over {steps}{more}"
    if wrong:
        check = wrong[0]
        return (
            f"DEVIATES on one device: not so: {check.claim} ({check.value:.1e} > {check.limit:.0e})"
        )
    # The first layout that is not sound; the checks of one device are, by now.
    row = next(row for row in ran if not row.sound)
    if row.failure:
        return f"DEVIATES: {row.name} {row.failure}"
    if row.first:
        first = row.first
        # Behind the steps comes the one with tied routers. The state is compared there, but it is
        # that after the steps.
        tied = first.step >= result.steps and first.check != "state"
        step = "with all router scores equal" if tied else f"step {first.step}"
        of = f" of {first.where}" if first.where else ""
        return (
            f"DEVIATES: {row.name}, {step}: {first.check}{of} by {first.value:.1e} "
            f"(limit {LIMITS[first.check]:.0e})"
        )
    return f"DEVIATES: {row.name}: its checkpoint read on {row.reader} differs in {row.unequal[0]}"


def rules_table(rules: list[shrink.Rule]) -> Table:
    """Returns the table of the keys that were shrunk for the proof, and why."""
    table = Table([*names("key"), *prose("yours -> here", "why")])
    for rule in rules:
        table.add(rule.key, f"{rule.yours} -> {rule.shrunk}", Text(rule.why, style="dim"))
    return table


def meshes_table(result: Result) -> Group:
    """Returns a row for each layout and mesh, and a line below that names the worst gradient."""
    title = "largest deviation from one device, float64"
    columns = numbers(*COLUMNS.values(), "checkpoint", "float32")
    table = Table([*names("mesh"), *columns], title=title)
    limits = [number(LIMITS[check]) for check in COLUMNS]
    table.add("limit", *limits, "equal bits", "not judged", style="dim")
    for row in result.rows:
        table.add(*cells(row))
    gradients = [row.deviations["gradients"] for row in result.rows if row.deviations]
    if not gradients:
        return Group(table)
    worst = max(gradients, key=lambda deviation: deviation.value)
    return Group(table, Text(f"worst gradient: {worst.where}, step {worst.step}", style="dim"))


def cells(row: Row) -> list[str | Text]:
    """Returns the cells of one layout: its deviations, or that it was refused or fails."""
    # "1x1x1 accumulate+scan+remat" takes two lines, so that the numbers have room.
    name = row.name.replace(" ", "\n", 1)
    if row.refused or row.failure:
        return [name, "refused" if row.refused else Text("fails", style="red")]
    marks: list[str | Text] = []
    for check in COLUMNS:
        deviation = row.deviations.get(check)
        marks.append(judged(deviation.value, deviation.sound) if deviation else "-")
    checkpoint: str | Text = f"on {row.reader}" if row.reader else "-"
    if row.unequal:
        checkpoint = Text(f"{len(row.unequal)} differ", style="red")
    return [name, *marks, checkpoint, float32(row)]


def float32(row: Row) -> str:
    """Returns how far float32 is off, and in which step a routing decision flips first."""
    if not row.rounded:
        return "-"
    flip = "no flip" if row.rounded.flip is None else f"flip {row.rounded.flip}"
    return f"{number(row.rounded.loss)} {flip}"


def alone_table(checks: list[Check]) -> Table:
    """Returns the table of what is checked on one device."""
    title = "on one device, for faults that every mesh would share"
    table = Table([*prose("claim"), *numbers("deviation", "limit"), *prose("note")], title=title)
    for check in checks:
        limit = number(check.limit) if check.judged else "not judged"
        table.add(check.claim, judged(check.value, check.sound), limit, check.note)
    return table
