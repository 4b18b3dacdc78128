"""`python -m moe_jax report --workdir DIR [DIR ...] --out FILE`: one HTML page of some runs.

Curves, the load of every expert over layers and steps, saturation, co-activation, what an expert
tells about a token, typical tokens, paths from layer to layer, drops and dead experts, a text that
is coloured by expert, the knock-out per domain where `probe` has measured it, and the experts of
several runs matched with each other. The page needs no network. docs/report.md explains it.

The routing is recorded anew, of the same held-out rows, at the checkpoints that the run has kept
(checkpoint.every, checkpoint.keep).
"""

import argparse
from pathlib import Path

from moe_jax import extras
from moe_jax.commands.probe import refuse_other
from moe_jax.errors import UserError
from moe_jax.instruments.page import collect, page
from moe_jax.run import open_run
from moe_jax.runtime import shell
from moe_jax.terminal import working


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", type=Path, nargs="+", required=True, help="of training runs")
    parser.add_argument("--out", type=Path, required=True, help="the HTML file that is written")
    parser.add_argument(
        "--batches", type=int, default=4, help="held-out batches, 0 = all (default %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=8, help="checkpoints at most, evenly (default %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    flags = parse(argv)
    extras.require("report", "vl_convert")
    for name, least in (("batches", 0), ("steps", 1)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name} {getattr(flags, name)} must be at least {least}")
    if flags.out.suffix != ".html":
        raise UserError(f"--out {flags.out}: name a file that ends in .html")
    for workdir in flags.workdir:
        refuse_other(open_run(workdir, silent=True).config, workdir)
    runs = []
    with working.shown("report") as tell:
        for workdir in flags.workdir:
            tell(str(workdir))
            runs.append(collect.collect(workdir, flags.batches, flags.steps, tell))
        tell("writing the page")
        page.write(flags.out, runs)
    for run in runs:
        for note in run.notes:
            shell.tell(f"{run.name}: {note}")
    size = flags.out.stat().st_size / 1e6
    shell.tell(f"written: {flags.out} ({size:.1f} MB)")
    return 0
