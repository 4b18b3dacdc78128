"""Measures whether a later token, or another sequence of the batch, changes an earlier token's
output; docs/routers.md has the table.

    python -m moe_jax leak --config quickstart --config.model.moe.dispatcher=capacity
    python -m moe_jax leak --config base --all --markdown

A small random model of the config in float64, in training and in evaluation mode. `--all` measures
every router x ordering x dispatcher instead of the config's own, with capacity so tight that it
binds.

Exit codes, of use in a script: 0 the config is safe, or says model.allow_leak=True; 1 it leaks and
must not, or its label is wrong (what is labelled safe leaks); 64 a mistake that the message names.
With --all, whose table has what leaks on purpose, 1 is for a wrong label alone.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import jax

from moe_jax import config
from moe_jax.config import command_line
from moe_jax.errors import UserError
from moe_jax.instruments import leak
from moe_jax.runtime import shell
from moe_jax.schema.config import Config
from moe_jax.terminal import working
from moe_jax.terminal.table import Table, names, numbers, prose

COLUMNS = [
    *names("router", "ordering", "dispatcher"),
    *numbers("future, train", "future, eval", "batch, train", "batch, eval"),
    *prose("verdict"),
]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax leak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="every router x ordering x dispatcher, not the config's own",
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print a Markdown table, as for docs/routers.md"
    )
    return command_line.parse(parser, argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    raw = command_line.read(args.config, args.changes)
    # In float32 rounding would look like a leak.
    jax.config.update("jax_enable_x64", True)
    small = leak.shrink(raw)
    own = config.build(small, 1)
    # Depth blocks can leak without any expert; the table of all is of routers.
    if not own.model.num_moe_layers and (args.all or not own.model.num_depth_blocks):
        raise UserError(
            f"{args.config} has no block with experts: model.prefix, model.period and model.suffix "
            "name none"
        )
    rows = []
    with working.shown("leak") as tell:
        for cfg in leak.combinations(raw) if args.all else [own]:
            moe = cfg.model.moe
            tell(f"{moe.router}, {moe.ordering}, {moe.dispatcher}")
            measured = leak.measure(cfg)
            of_batch = [text(measured[mode].batch) for mode in leak.MODES]
            cells = [*future(cfg, measured), *of_batch]
            rows.append((cfg, cells, leak.verdict(cfg, measured)))
    shape = (
        f"{own.train.batch_size} rows of {own.data.seq_len} tokens, "
        f"groups of {own.model.moe.group_rows} rows"
    )
    shell.tell(f"{shape}; largest change over the largest logit, share of tokens that changed")
    if args.markdown:
        print(table(rows).markdown())
    else:
        shell.console().print(table(rows))
    verdicts = [verdict for _, _, verdict in rows]
    # The table of all has what leaks on purpose.
    wrong = failures(verdicts, allowed=args.all or raw["model"]["allow_leak"])
    for line in wrong:
        shell.tell(f"error: {line}", sys.stderr)
    return int(bool(wrong))


def failures(verdicts: Sequence[str], allowed: bool) -> list[str]:
    """Returns what makes the command end with 1, a line for each: wrong labels, and leaks where
    none is `allowed`.
    """
    lines = []
    for verdict in dict.fromkeys(verdicts):
        if verdict.startswith(leak.FAULT):
            lines.append(verdict)
        elif verdict != leak.SAFE and not allowed:
            lines.append(
                f"the config {verdict}, and model.allow_leak is False: choose another router, "
                "ordering or dispatcher (docs/routers.md), or set model.allow_leak=True"
            )
    return lines


def future(cfg: Config, measured: Mapping[str, leak.Measured]) -> list[str]:
    """Returns the leak of both modes; "-" where a model reads its whole row and has no future."""
    if not leak.has_future(cfg):
        return ["-"] * len(leak.MODES)
    return [text(measured[mode].future) for mode in leak.MODES]


def text(measured: leak.Leak) -> str:
    return f"{measured.delta:.2g}, {measured.share:.0%}" if measured.delta else "0"


def table(rows: list[tuple[Config, list[str], str]]) -> Table:
    result = Table(COLUMNS, keys=3)
    for cfg, cells, verdict in rows:
        moe = cfg.model.moe
        result.add(moe.router, moe.ordering, moe.dispatcher, *cells, verdict)
    return result
