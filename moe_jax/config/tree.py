"""The tree of keys that users change, assembled from the dataclasses that declare them.

A choice and its options are siblings: `model.moe.router = "top_k"` picks the block
`model.moe.routers.top_k`. Only the chosen block travels on; changing a key of a block that is not
chosen is an error, because it would do nothing.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from moe_jax.models import MODELS
from moe_jax.models.attentions import ATTENTIONS
from moe_jax.models.rope_scalings import ROPE_SCALINGS
from moe_jax.moe.activations import ACTIVATIONS
from moe_jax.moe.dispatch import DISPATCHERS
from moe_jax.moe.losses import LOSSES
from moe_jax.moe.ordering import ORDERINGS
from moe_jax.moe.routing import ROUTERS
from moe_jax.moe.sparse import PATTERNS, RULES
from moe_jax.optim import OPTIMIZERS, SCHEDULES
from moe_jax.schema.config import NO_RULE, Config
from moe_jax.schema.options import NOT_NEGATIVE, Option, declared
from moe_jax.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Nothing:
    """The options of what has none."""


# The path of a choice: the registry of what may be chosen there.
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "task": TASKS,
    "model.kind": MODELS,
    "model.attention": ATTENTIONS,
    "model.rope_scaling": ROPE_SCALINGS,
    "model.activation": ACTIVATIONS,
    "model.moe.router": ROUTERS,
    "model.moe.ordering": ORDERINGS,
    "model.moe.dispatcher": DISPATCHERS,
    "model.moe.sparse.rule": RULES,
    "model.moe.sparse.pattern": PATTERNS,
    "optim.optimizer": OPTIMIZERS,
    "optim.schedule": SCHEDULES,
}
# What may be chosen beside the components of a registry: nothing at all.
NO_CHOICE = {"model.moe.sparse.rule": NO_RULE}
COEFFICIENTS = "model.moe.losses"


class Key(NamedTuple):
    """A key of the tree."""

    path: str
    default: Any
    option: Option


class Choice(NamedTuple):
    """A choice: its block, the keys of all blocks, and where the frozen config has the options."""

    # Of the choice: "model.moe.router".
    path: str
    # Of the options of all that may be chosen: "model.moe.routers".
    blocks: str
    # The field of the frozen config: "router_options".
    frozen: str
    options: dict[str, type]


def keys() -> Iterator[Key]:
    """Yields every key, in the order in which they are declared."""
    yield from _keys(Config, "")


def choices() -> Iterator[Choice]:
    """Yields every choice."""
    yield from _choices(Config, "")


def defaults() -> ConfigDict:
    """Returns a new, locked tree of all defaults."""
    tree: dict[str, Any] = {}
    for choice in choices():
        # Also those without any key: a block of each has to be there.
        for name in choice.options:
            _put(tree, f"{choice.blocks}.{name}", {})
    for key in keys():
        _put(tree, key.path, key.default)
    return ConfigDict(tree).lock()


def options_of(path: str) -> dict[str, type]:
    """Returns the dataclass of the options of everything that may be chosen at a path.

    A registry is asked each time, so a component that is registered later counts.
    """
    options: dict[str, type] = {}
    if path in NO_CHOICE:
        options[NO_CHOICE[path]] = Nothing
    for name, component in REGISTRIES[path].items():
        options[name] = component.options
    return options


def _keys(cls: type, path: str) -> Iterator[Key]:
    """Yields the keys of a dataclass and of the blocks in it; `path` ends in a dot, or is ""."""
    hints = typing.get_type_hints(cls)
    own = declared(cls)
    for field in dataclasses.fields(cls):
        at = path + field.name
        option = own.get(field.name)
        # A field that declares nothing is a block: its type declares keys.
        if option is None:
            yield from _keys(hints[field.name], at + ".")
        elif option.derived:
            # The losses have no dataclass: each has its coefficient in its own file.
            if at == COEFFICIENTS:
                yield from _coefficients()
            if option.keys:
                yield from _keys(option.keys, at + ".")
        else:
            yield Key(at, option.default, option)
            # Behind a choice come the options of all that may be chosen.
            if option.block:
                for name, options in options_of(at).items():
                    yield from _keys(options, f"{path}{option.block}.{name}.")


def _coefficients() -> Iterator[Key]:
    for name, loss in LOSSES.items():
        option = Option(loss.coefficient, loss.comment, NOT_NEGATIVE)
        yield Key(f"{COEFFICIENTS}.{name}", loss.coefficient, option)


def _choices(cls: type, path: str) -> Iterator[Choice]:
    """Yields the choices of a dataclass and of the blocks in it."""
    hints = typing.get_type_hints(cls)
    own = declared(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name, following in zip(names, [*names[1:], ""], strict=True):
        option = own.get(name)
        if option is None:
            yield from _choices(hints[name], f"{path}{name}.")
        elif option.block:
            # The field after a choice has the options of what is chosen (schema/options.py).
            yield Choice(path + name, path + option.block, following, options_of(path + name))


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets the value of a dotted path that has none so far."""
    *parents, last = path.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    # A block that is there stays as it is.
    tree.setdefault(last, value)


def at(tree: Mapping[str, Any], path: str) -> Any:
    """Returns the value of a dotted path; the tree itself of ""."""
    for part in path.split(".") if path else ():
        tree = tree[part]
    return tree
