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
from pathlib import Path

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
from moe_jax.verify.run import ALL, Result, Row, Wanted, prove

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
        "--meshes", help="DATAxEXPERTxMODEL,... of up to 8 devices; default: all ten of 8"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="2, 4 or 8: also as many real processes, on 2x2x2"
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
    args, console, start = parse(argv), shell.console(), time.monotonic()
    raw, shapes = command_line.read(args.config, args.changes), meshes(args.meshes)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    if args.processes not in (1, 2, 4, 8):
        raise UserError(f"--processes {args.processes} must be one of 1, 2, 4, 8")
    if args.certificate:
        certificate.refuse_unwritable(args.certificate)
    wanted = Wanted(shapes, args.steps, args.processes, args.float32)
    with working.shown("verify") as tell:
        found = prove(raw, wanted, tell)
    text = verdict(found)
    console.print(rules_table(found.rules), "", meshes_table(found))
    for row in found.rows:
        if row.refused or row.failure:
            console.print(
                f"{row.name}: {row.refused or row.failure}",
                style="dim" if row.refused else "red",
                markup=False,
            )
    for note in found.notes:
        console.print(note, style="dim", markup=False, highlight=False)
    console.print("", alone_table(found.alone), "")
    console.print(
        f"[bold {'green' if found.proven else 'red'}]{text}[/] ({time.monotonic() - start:.0f} s)"
    )
    if args.certificate:
        certificate.write(
            args.certificate, certificate.content(raw, str(args.config), args.changes, found, text)
        )
        console.print(f"certificate: {args.certificate}")
    return 0 if found.proven else 1


def meshes(text: str | None) -> list[mesh.Lengths]:
    if text is None:
        return list(ALL)
    shapes = list(dict.fromkeys(mesh.parse(part, "--meshes") for part in text.split(",")))
    for shape in shapes:
        if shape.num_devices > shrink.DEVICES:
            raise UserError(
                f"--meshes {shape} has more than the {shrink.DEVICES} devices simulated"
            )
    return shapes


def verdict(found: Result) -> str:
    """One line: proven, or what deviates and where first."""
    ran = [row for row in found.rows if not row.refused]
    wrong = [check for check in found.alone if not check.sound]
    if found.proven:
        refused = len(found.rows) - len(ran)
        more = f"; {refused} refused, for the reason above" if refused else ""
        return (
            f"PROVEN: {len(ran)} layouts equal one device over {found.steps} "
            f"step{'s' * (found.steps != 1)}{more}"
        )
    if wrong:
        return (
            f"DEVIATES on one device: not so: {wrong[0].claim} "
            f"({wrong[0].value:.1e} > {wrong[0].limit:.0e})"
        )
    row = next(row for row in ran if not row.sound)
    if row.failure:
        return f"DEVIATES: {row.name} {row.failure}"
    if row.first:
        of = f" of {row.first.where}" if row.first.where else ""
        limit = LIMITS[row.first.check]
        step = (
            f"step {row.first.step}"
            if row.first.step < found.steps or row.first.check == "state"
            else "with all router scores equal"
        )
        return (
            f"DEVIATES: {row.name}, {step}: {row.first.check}{of} by {row.first.value:.1e} "
            f"(limit {limit:.0e})"
        )
    return f"DEVIATES: {row.name}: its checkpoint read on {row.reader} differs in {row.unequal[0]}"


def rules_table(rules: list[shrink.Rule]) -> Table:
    table = Table([*names("key"), *prose("yours -> here", "why")])
    for rule in rules:
        table.add(rule.key, f"{rule.yours} -> {rule.shrunk}", Text(rule.why, style="dim"))
    return table


def meshes_table(found: Result) -> Group:
    title = "largest deviation from one device, float64"
    columns = numbers(*COLUMNS.values(), "checkpoint", "float32")
    table = Table([*names("data x expert x model"), *columns], title=title)
    table.add(
        "limit",
        *(number(LIMITS[check]) for check in COLUMNS),
        "equal bits",
        "not judged",
        style="dim",
    )
    for row in found.rows:
        table.add(*cells(row))
    worst = max(
        (r.deviations["gradients"] for r in found.rows if r.deviations),
        key=lambda d: d.value,
        default=None,
    )
    caption = (
        [Text(f"worst gradient: {worst.where}, step {worst.step}", style="dim")] if worst else []
    )
    return Group(table, *caption)


def cells(row: Row) -> list[str | Text]:
    name = row.name.replace(" ", "\n", 1)
    if row.refused or row.failure:
        return [name, "refused" if row.refused else Text("fails", style="red")]
    marks: list[str | Text] = []
    for check in COLUMNS:
        found = row.deviations.get(check)
        marks.append(judged(found.value, found.sound) if found else "-")
    checkpoint: str | Text = f"on {row.reader}" if row.reader else "-"
    if row.unequal:
        checkpoint = Text(f"{len(row.unequal)} differ", style="red")
    return [name, *marks, checkpoint, float32(row)]


def judged(value: float, sound: bool) -> Text:
    return Text(number(value), style="" if sound else "red")


def float32(row: Row) -> str:
    if not row.rounded:
        return "-"
    flip = "no flip" if row.rounded.flip is None else f"flip {row.rounded.flip}"
    return f"{number(row.rounded.loss)} {flip}"


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"


def alone_table(checks: list[Check]) -> Table:
    title = "on one device, for faults that every mesh would share"
    table = Table([*prose("claim"), *numbers("deviation", "limit"), *prose("note")], title=title)
    for check in checks:
        limit = number(check.limit) if check.judged else "not judged"
        table.add(check.claim, judged(check.value, check.sound), limit, check.note)
    return table
