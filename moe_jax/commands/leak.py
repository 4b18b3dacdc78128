"""Measures whether a later token, or another sequence of the batch, changes an earlier token's output; docs/routers.md has the table.

    python -m moe_jax leak --config configs/quickstart.py
    python -m moe_jax leak --config configs/base.py --all --markdown

A small random model of the config in float64, in training and in evaluation mode. `--all` measures every router x
ordering x dispatcher instead of the config's own, with capacity so tight that it binds. Exit codes: 0 nothing leaks that is labelled
safe, 1 something does, 64 a mistake that the message names.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from moe_jax import config, config_file, shell
from moe_jax.config import Config
from moe_jax.errors import UserError

HEAD = ("router", "ordering", "dispatcher", "future, train", "future, eval", "batch, train", "batch, eval", "verdict")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m moe_jax leak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="config file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes a key of it")
    parser.add_argument("--all", action="store_true", help="every router x ordering x dispatcher, not the config's own")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table, as for docs/routers.md")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args, console = parse(argv), shell.console()
    raw = config_file.read(args.config, args.set, "--set")
    jax.config.update("jax_enable_x64", True)
    from moe_jax.instruments import leak  # behind the flag: it traces in float64

    small = leak.shrink(raw)
    own = config.build(small, 1)
    if not own.model.num_moe_layers and (args.all or not own.model.num_depth_blocks):
        raise UserError(
            f"{args.config} has no block with experts: model.prefix, model.period and model.suffix name none"
        )
    rows = []
    with console.status("") as status:
        for cfg in leak.combinations(raw) if args.all else [own]:
            moe = cfg.model.moe
            status.update(f"{moe.router} {moe.ordering} {moe.dispatcher}")
            found = leak.measure(cfg)
            rows.append(
                (
                    cfg,
                    [text(getattr(found[m], kind)) for kind in ("future", "batch") for m in leak.MODES],
                    leak.verdict(cfg, found),
                )
            )
    shape = f"{own.train.batch_size} rows of {own.data.seq_len} tokens, groups of {own.model.moe.group_rows} rows"
    console.print(f"{shape}; largest change over the largest logit, share of tokens that changed")
    show(console, rows, args.markdown)
    return int(any(label.startswith("FAULT") for _, _, label in rows))


def text(found: Any) -> str:
    return f"{found.delta:.2g}, {found.share:.0%}" if found.delta else "0"


def show(console: Console, rows: list[tuple[Config, list[str], str]], markdown: bool) -> None:
    lines = [
        (c.model.moe.router, c.model.moe.ordering, c.model.moe.dispatcher, *cells, label) for c, cells, label in rows
    ]
    if markdown:
        for line in (HEAD, ("---",) * len(HEAD), *lines):
            print(f"| {' | '.join(line)} |")
        return
    table = Table()
    for name in HEAD:
        table.add_column(name, overflow="fold", no_wrap=name in HEAD[:3])
    for line in lines:
        table.add_row(*line)
    console.print(table)
