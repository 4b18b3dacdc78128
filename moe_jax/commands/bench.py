"""Times a config: training steps of its variants, decoding, the skew of the MoE layer, the start,
how steps grow with experts and tokens, what a run spends beside its steps; beside the peak of this
machine and, with --rivals, beside Hugging Face transformers.

    python -m moe_jax bench --config bench:e8 --rounds 15 --variant e8: \
        --variant "e64 capacity: --config.model.moe.num_experts=64 \
        --config.model.moe.dispatcher=capacity"
    python -m moe_jax bench --config bench:e8 --what decode --rivals --out now.json

Keys that are changed outside of a variant are changed in all. Without --variant a config file that
has variants of its own is timed with all of them.

Every row has a process of its own. In every round each of them runs once, in turn, so that a
machine that changes its speed changes it for all. Reported are medians; ratios are medians over
rounds of the ratio within a round.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax import config
from moe_jax.bench import overheads, parts, results, rivals, scaling
from moe_jax.bench.contract import Job
from moe_jax.bench.session import Part, Session
from moe_jax.config import command_line, config_file
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import AXES
from moe_jax.runtime import shell
from moe_jax.terminal import working
from moe_jax.terminal.table import Table

PARTS: dict[str, Callable[[Session], Part]] = {
    "train": parts.train,
    "decode": parts.decode,
    "layer": parts.layer,
    "start": parts.start,
    "scaling": scaling.scaling,
    "depth": scaling.depth,
    "overheads": overheads.overheads,
}
# Losses of the first step of both models may differ by so much: weights are drawn differently.
LOSSES = 0.3


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax bench", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "--variant",
        action="append",
        help="'NAME: --config.KEY=VALUE --config.KEY=VALUE'; the first is the reference (default: "
        "the variants of the config file, else the config as it is)",
    )
    parser.add_argument(
        "--what",
        action="append",
        choices=PARTS,
        help="a part to run, may be given several times (default: train)",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="times that each row is timed (default 15)"
    )
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="time transformers in the same rounds (pip install 'moe_jax[hf]')",
    )
    parser.add_argument("--out", type=Path, help="write every time of every round here, as JSON")
    parser.add_argument("--plot", type=Path, help="draw what --what scaling has measured here")
    parser.add_argument("--against", type=Path, help="compare with a file of --out")
    args = command_line.parse(parser, argv)
    args.what = args.what or ["train"]
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: at least 1")
    return args


def main(argv: list[str]) -> int:
    """Times what is asked for, prints the tables, and returns the exit code."""
    args = parse(argv)
    # Whatever can be wrong is said before the first process is started.
    before = results.read(args.against) if args.against else None
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if path and not path.parent.is_dir():
            raise UserError(f"{flag} {path}: {path.parent} is no directory")
    if args.plot and "scaling" not in args.what:
        raise UserError(f"--plot {args.plot} draws --what scaling, which is not asked for")
    variants = read_variants(args)
    if args.rivals:
        refuse_without_rival(variants)
    measured: dict[str, Any] = {"machine": results.machine()}
    tables: list[Table] = []
    with working.shown("bench") as tell:
        session = Session(variants, args.rounds, args.rivals, tell)
        # In the order of PARTS, whatever the order of the flags.
        for name, run in PARTS.items():
            if name in args.what:
                figures, shown = run(session)
                measured |= figures
                tables += shown
    console = shell.console()
    for table in tables:
        console.print(table)
    now = results.plain(measured)
    if args.plot:
        scaling.draw(measured["scaling"], args.plot)
    if args.out:
        args.out.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    if before:
        console.print(results.against(now, before, args.against.name))
    return 1 if unlike(measured) else 0


def read_variants(args: argparse.Namespace) -> dict[str, tuple[Job, config.Config]]:
    """Returns the training job and the config of each variant, by name.

    Raises UserError for one that the rules refuse: all of them, before the first is compiled.
    """
    named = [command_line.named(text, "--variant") for text in args.variant or []]
    described = [(name, str(args.config), tuple(changes)) for name, changes in named]
    if not described:
        own = config_file.variants(args.config)
        described = [(name, f"{args.config}:{name}", ()) for name in own]
    if not described:
        described = [(args.config.stem, str(args.config), ())]
    variants = {}
    for name, file, changes in described:
        try:
            raw = command_line.read(Path(file), [*args.changes, *changes])
            # Of the devices only a worker knows: this process leaves them alone.
            cfg = config.build(raw, raw["simulate_devices"] or _fewest_devices(raw["mesh"]))
        except UserError as error:
            text = f"--variant {name}: {error}" if changes else str(error)
            raise UserError(text) from None
        variants[name] = Job(name, "train", file, (*args.changes, *changes)), cfg
    return variants


def _fewest_devices(lengths: Mapping[str, Any]) -> int:
    """Returns how many devices a mesh needs where `-1` stands for one."""
    return math.prod(abs(length) for name, length in lengths.items() if name in AXES)


def refuse_without_rival(variants: Mapping[str, tuple[Job, config.Config]]) -> None:
    """Raises UserError where no variant can be built in transformers, or it is not installed."""
    try:
        import torch
        import transformers

        del torch, transformers
    except ImportError as error:
        raise UserError(f"--rivals needs {error.name}: pip install 'moe_jax[hf]' torch") from None
    reasons = {name: rivals.why_none(cfg) for name, (_, cfg) in variants.items()}
    if all(reasons.values()):
        name, reason = next(iter(reasons.items()))
        raise UserError(f"--rivals: {name!r} has none, for {reason}")


def unlike(measured: Mapping[str, Any]) -> bool:
    """Says of which rows the first losses differ, and returns whether there are any: then the two
    models are not alike, and neither are their times.
    """
    rows: Sequence[results.Row] = measured.get("training", [])
    far = []
    for row in rows:
        if row.rival and not math.isclose(
            row.timing.facts["loss"], row.rival.facts["loss"], abs_tol=LOSSES
        ):
            far.append(row.name)
    for name in far:
        shell.tell(
            f"error: {name}: the losses of the first step differ by more than {LOSSES}: the "
            "models are not alike",
            sys.stderr,
        )
    return bool(far)
