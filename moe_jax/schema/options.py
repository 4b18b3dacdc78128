"""How a key of the config is declared: a line of a frozen dataclass, beside the code that reads it.

    @dataclasses.dataclass(frozen=True)
    class Options:
        k: int = option(2, "experts per token", NUMBER)
        softmax: str = option("before", "the selection", choices=("before", "after"))

The tree that users change (config/tree.py), its printed comments, the types and the bounds all come
from these lines. Rules that tie keys to each other are `refusals` of a component, or of
config/rules.py.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from moe_jax.errors import UserError

T = TypeVar("T")
# Of a field's metadata.
KEY = "option"


class Bound(NamedTuple):
    """Whole or real numbers that a key may have. `words` end the sentence "KEY = VALUE must be"."""

    words: str
    holds: Callable[[Any], bool]
    whole: bool


class Option(NamedTuple):
    """Holds what is declared of a key beside its name and type."""

    default: Any
    comment: str = ""
    # Of a number, or of each number of a tuple.
    bound: Bound | None = None
    # The texts that it may be; () = any.
    choices: tuple[str, ...] = ()
    # Of a choice: the key of the blocks that have the options of what may be chosen.
    block: str = ""
    # No key: `build` computes it from others, or from those of `keys`.
    derived: bool = False
    # (what the user wrote, path) -> the value.
    parse: Callable[[Any, str], Any] | None = None
    # Of a derived field that is a block: the dataclass of its keys.
    keys: type | None = None


def whole(words: str, holds: Callable[[Any], bool]) -> Bound:
    return Bound(words, holds, True)


def real(words: str, holds: Callable[[Any], bool]) -> Bound:
    return Bound(words, holds, False)


def at_least(least: int) -> Bound:
    return whole(f"at least {least}", lambda v: v >= least)


# Of things that may be none, and of things that there must be.
COUNT, NUMBER = at_least(0), at_least(1)
# Counted in an int32.
STEPS = whole("at least 1 and below 2**31", lambda v: 1 <= v < 2**31)
SEED = whole("at least 0 and below 2**32", lambda v: 0 <= v < 2**32)
NO_LABEL_OR_MORE = whole("0 or at least 2", lambda v: v == 0 or v >= 2)
NOT_NEGATIVE = real("at least 0", lambda v: v >= 0)
POSITIVE = real("above 0", lambda v: v > 0)
FROM_ONE = real("at least 1", lambda v: v >= 1)
FRACTION = real("at least 0 and at most 1", lambda v: 0 <= v <= 1)
PART = real("above 0 and at most 1", lambda v: 0 < v <= 1)
BELOW_ONE = real("at least 0 and below 1", lambda v: 0 <= v < 1)
NOT_TINY = real("at least 1e-06", lambda v: v >= 1e-6)
IN_FLOAT32 = real("at least 1e-20", lambda v: v >= 1e-20)
# mesh.data = -1 takes the devices that the other axes leave; see parallel/mesh.py.
AXIS = whole("at least 1, or -1 for the rest of the devices", lambda v: v == -1 or v >= 1)


def option(
    default: Any,
    comment: str = "",
    bound: Bound | None = None,
    choices: tuple[str, ...] = (),
    parse: Callable[[Any, str], Any] | None = None,
) -> Any:
    """Declares a key of the config."""
    declared = Option(default, comment, bound=bound, choices=choices, parse=parse)
    # The value is another than what the user writes, so the default is no value.
    if parse:
        return dataclasses.field(metadata={KEY: declared})
    return dataclasses.field(default=default, metadata={KEY: declared})


def choice(default: str, block: str, comment: str = "") -> Any:
    """Declares the choice of a component, whose options are below the key `block`.

    A choice and its options are siblings: `moe.router = "sinkhorn"` and
    `moe.routers.sinkhorn.iterations = 8`. The field after it gets the options of what is chosen.
    """
    declared = Option(default, comment, block=block)
    return dataclasses.field(default=default, metadata={KEY: declared})


def derived(keys: type | None = None) -> Any:
    """Declares a field that `build` computes, and that is no key of the config.

    `keys`: the dataclass of the keys below its name, from which it is computed.
    """
    return dataclasses.field(metadata={KEY: Option(None, derived=True, keys=keys)})


def typed_options(cls: type[T], options: Any) -> T:
    """Returns the options of what is chosen, which a component knows to be its own `cls`."""
    assert isinstance(options, cls), f"{options} are no options of {cls.__module__}"
    return options


def declared(cls: type) -> dict[str, Option]:
    """Returns what a dataclass declares of each of its keys, in their order."""
    return {
        field.name: field.metadata[KEY]
        for field in dataclasses.fields(cls)
        if KEY in field.metadata
    }


def freeze(cls: type, raw: Mapping[str, Any], path: str) -> Any:
    """Returns a dataclass from a nested dict; every key must be there, be known and have its type.

    `path` is that of the block, with a dot at its end where it is not the root. Raises UserError.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    refuse_other_keys(raw, names, path)
    # Not field.type, which may be a text.
    hints = typing.get_type_hints(cls)
    keys = declared(cls)
    values = {}
    for name in names:
        values[name] = _convert(hints[name], raw[name], path + name, keys.get(name))
    return cls(**values)


def refuse_other_keys(raw: Mapping[str, Any], known: Sequence[str], path: str) -> None:
    """Raises a UserError for a key of a block that is not known, or that is missing."""
    unknown = sorted(set(raw) - set(known))
    missing = sorted(set(known) - set(raw))
    # One message is enough: the first key by name.
    if unknown or missing:
        if unknown:
            what = f"unknown key {path}{unknown[0]}"
        else:
            what = f"the key {path}{missing[0]} is missing"
        raise UserError(f"{what}: `python -m moe_jax config` lists every key")


def _convert(hint: Any, value: Any, path: str, key: Option | None) -> Any:
    """Returns the value of a field from what the user wrote. Raises UserError for another type."""
    if key and key.derived:
        # Made by `build`; what it was made of has bounds of its own.
        return value
    if dataclasses.is_dataclass(hint):
        return freeze(typing.cast(type, hint), value, path + ".")
    if key and key.parse:
        return key.parse(value, path)
    # Of tuple[str, ...] it is tuple; of a plain type None.
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(
                f"{path} = {value!r} is a {type(value).__name__}; it must be a tuple, as its "
                "default is"
            )
        # JSON has lists where a config has tuples, and tuples in them.
        return tuple(tuple(entry) if isinstance(entry, list | tuple) else entry for entry in value)
    # These have no single type that could be compared.
    if hint is Any or origin in (typing.Union, types.UnionType, Mapping):
        return value
    if key and key.bound and not isinstance(value, str):
        # `refusals` says what number it must be.
        return value
    # A bool is an int in Python, and no number here.
    is_bool = isinstance(value, bool)
    # A user may write 1 for 1.0.
    if hint is float and isinstance(value, int) and not is_bool:
        return float(value)
    if not isinstance(value, hint) or (hint is int and is_bool):
        raise UserError(
            f"{path} = {value!r} is a {type(value).__name__}; it must be a {hint.__name__}"
        )
    return value


def refusals(options: Any, path: str) -> Iterator[str]:
    """Yields a message for each key of a frozen block, and of the blocks in it, that is out of its
    bounds or none of its choices.
    """
    # The keys of the block itself come before those of the blocks in it.
    for name, key in declared(type(options)).items():
        value = getattr(options, name)
        at = f"{path}{name}"
        if key.bound:
            yield from of_number(at, value, key.bound)
        if key.choices:
            yield from not_among(at, value, key.choices)
    # What declares nothing is a block.
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if KEY not in field.metadata and dataclasses.is_dataclass(value):
            yield from refusals(value, f"{path}{field.name}.")


def not_among(path: str, value: str, allowed: tuple[str, ...]) -> Iterator[str]:
    """Yields a message for a text that is none of those that are allowed."""
    if value not in allowed:
        yield f'{path} = "{value}" is not known: choose one of {", ".join(allowed)}'


def of_number(path: str, value: Any, bound: Bound) -> Iterator[str]:
    """Yields a message for a number, or for each of a tuple, that is out of its bounds."""
    # A whole number is a real one, too.
    kind = int if bound.whole else int | float
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, kind):
            word = "whole number" if bound.whole else "number"
            yield f"{path} = {value} must be a {word}, {bound.words}"
        elif not math.isfinite(number):
            yield f"{path} = {value} must be finite and {bound.words}"
        elif not bound.holds(number):
            yield f"{path} = {value} must be {bound.words}"


def of_sources(sources: Any) -> Iterator[str]:
    """Yields what is wrong with data.sources, which are pairs of a source and its weight."""
    right = (
        'write pairs of a source and its weight, as in (("embedded", 1.0),) or '
        '(("datasets/a", 3.0), ("datasets/b", 1.0))'
    )
    if not sources:
        yield 'data.sources is empty: name at least one, as in (("embedded", 1.0),)'
    for entry in sources:
        if not (isinstance(entry, tuple | list) and len(entry) == 2):
            yield f"data.sources = {sources!r} has {entry!r} in it: {right}"
            continue
        source, weight = entry
        if not (isinstance(source, str) and isinstance(weight, float | int)):
            yield f"data.sources = {sources!r} has {entry!r} in it: {right}"
        elif not (math.isfinite(weight) and weight > 0):
            yield f"data.sources: the weight of {source!r} ({weight}) must be a number above 0"
