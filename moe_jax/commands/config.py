"""Every key of a config, with its comment: `python -m moe_jax config`.

    python -m moe_jax config --config configs/quickstart.py --config.model.moe.router=sigmoid

Without a file these are the defaults. What a file or a flag changed is marked, and the default
stands beside it.
"""

import argparse
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax import config
from moe_jax.config import command_line, tree
from moe_jax.config.config_file import default_values, values

WIDTH = 100
# In front of a key that is not as by default.
CHANGED = "*"


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the config file, or None, and in `changes` the words that change keys."""
    parser = argparse.ArgumentParser("python -m moe_jax config", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, help=command_line.HELP)
    changes, others = command_line.split(argv)
    return argparse.Namespace(**vars(parser.parse_args(others)), changes=changes)


def main(argv: list[str]) -> int:
    """Prints the tree of a config, and returns 0."""
    flags = parse(argv)
    defaults = default_values()
    if flags.config:
        raw = command_line.read(flags.config, flags.changes)
    else:
        changed = config.defaults()
        command_line.changed(changed, flags.changes)
        raw = values(changed)
    for line in lines(raw, defaults):
        print(line)
    return 0


def lines(raw: dict[str, Any], defaults: dict[str, Any]) -> Iterator[str]:
    """Yields a line for every key, with a comment behind it, by blocks."""
    blocks: list[str] = []
    for key in tree.keys():
        *parents, name = key.path.split(".")
        # Of the blocks around a key, those that the line above has too are not named again.
        shared = 0
        while blocks[: shared + 1] == parents[: shared + 1] and shared < len(parents):
            shared += 1
        for depth in range(shared, len(parents)):
            yield f"{'  ' * depth}  {parents[depth]}:"
        blocks = parents
        yield from _line(key, name, len(parents), tree.at(raw, key.path), defaults)


def _line(
    key: tree.Key, name: str, depth: int, value: Any, defaults: dict[str, Any]
) -> Iterator[str]:
    default = tree.at(defaults, key.path)
    mark = CHANGED if value != default else " "
    comment = key.option.comment
    if key.option.block:
        options = ", ".join(tree.options_of(key.path))
        comment = f"{comment}: {options}" if comment else options
    if value != default:
        was = f"default {as_tuples(default)!r}"
        comment = f"{comment} ({was})" if comment else was
    text = f"{'  ' * depth}{mark} {name} = {as_tuples(value)!r}"
    line = f"{text}  # {comment}" if comment else text
    if len(text) + len("  # ") + len(comment) <= WIDTH:
        yield line
        return
    # What does not fit stands above the key.
    indent = f"{'  ' * depth}  # "
    yield from textwrap.wrap(comment, WIDTH, initial_indent=indent, subsequent_indent=indent)
    yield text


def as_tuples(value: Any) -> Any:
    """Returns a value as a config file writes it: JSON has lists where a config has tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
