"""A model in another form.

    python -m moe_jax convert compact --workdir RUN --out DIR

A run without its experts' zeros: zero hidden units are removed, and zero blocks where that pays;
the outputs stay the same (docs/sparse_weights.md).

    python -m moe_jax convert export --workdir RUN --to DIR
    python -m moe_jax convert import --from DIR --out RUN

A run as a model of Hugging Face, and a model of Hugging Face as a run (docs/interchange.md).

A language model is read by `generate` and `probe`, and that of any task (whole matrices) by
train.init_from.

`upcycle` makes a run with experts of a dense one, and `surgery` moves, splits, merges, prunes, adds
or revives experts. What comes out trains on (docs/upcycling.md).
"""

import argparse
from collections.abc import Callable

from moe_jax.commands.conversions import compact, exporting, importing, operate, upcycle
from moe_jax.config import command_line
from moe_jax.errors import UserError

# By WHAT: the function that declares its flags, and the one that runs it.
Declare = Callable[[argparse.ArgumentParser], None]
CONVERSIONS: dict[str, tuple[Declare, Callable[[argparse.Namespace], int]]] = {
    "compact": (compact.declare, compact.run),
    "import": (importing.declare, importing.run),
    "export": (exporting.declare, exporting.run),
    "upcycle": (upcycle.declare, upcycle.run),
    "surgery": (operate.declare, operate.run),
}
# Those that take --config.KEY=VALUE.
CHANGE_CONFIGS = ("upcycle",)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m moe_jax convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="what", required=True)
    for name, (declare, _) in CONVERSIONS.items():
        declare(kinds.add_parser(name))
    changes, others = command_line.split(argv)
    flags = argparse.Namespace(**vars(parser.parse_args(others)), changes=changes)
    if changes and flags.what not in CHANGE_CONFIGS:
        raise UserError(f"convert {flags.what} changes no key of a config: leave {changes[0]} out")
    return flags


def main(argv: list[str]) -> int:
    flags = parse(argv)
    _, run = CONVERSIONS[flags.what]
    return run(flags)
