"""How keys of a config of Hugging Face become keys of ours, and back.

An entry reads some keys of theirs and gives keys of ours, by their paths, and writes the same keys
of theirs from ours. What an entry does not write it does not read either: what a family cannot say
shows itself when a config that was written is read again (exporting.py).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.interchange.settings import Settings

Ours = Mapping[str, Any]


class Entry(NamedTuple):
    """A part of a config, both ways."""

    # Their settings -> keys of ours. Raises UserError for a value that we do not have.
    read: Callable[[Settings], dict[str, Any]]
    # Keys of ours, as meaning.py has them -> their settings.
    write: Callable[[Ours], dict[str, Any]]


def writes_nothing(config: Ours) -> dict[str, Any]:
    """Returns no settings of theirs: the default of a family says what ours is."""
    del config
    return {}


def key(theirs: str, ours: str, default: Any = None, also: str = "") -> Entry:
    """Returns the entry of a key that means the same in both.

    Args:
      default: what theirs is where it is not there; None = it must be.
      also: another name of theirs, which is read too.
    """

    def read(settings: Settings) -> dict[str, Any]:
        name = also if also and settings.get(also) is not None else theirs
        value = settings.need(name) if default is None else settings.get(name, default)
        return {ours: value}

    def write(config: Ours) -> dict[str, Any]:
        return {theirs: config[ours]} if ours in config else {}

    return Entry(read, write)


def fixed(**ours: Any) -> Entry:
    """Returns the entry of what every model of a family is, by our paths with "__" for dots."""
    values = {path.replace("__", "."): value for path, value in ours.items()}

    def read(settings: Settings) -> dict[str, Any]:
        del settings
        return dict(values)

    return Entry(read, writes_nothing)


def only(theirs: str, value: Any, why: str) -> Entry:
    """Returns the entry of a key of which we have one value alone, their default.

    `why`: what we lack, for the message.
    """

    def read(settings: Settings) -> dict[str, Any]:
        if settings.get(theirs, value) != value:
            raise settings.refusal(theirs, f"moe_jax has no {why}; it reads {theirs} = {value!r}")
        return {}

    def write(config: Ours) -> dict[str, Any]:
        del config
        return {theirs: value}

    return Entry(read, write)


def ignored(*theirs: str) -> Entry:
    """Returns the entry of keys that change nothing that a forward pass computes."""

    def read(settings: Settings) -> dict[str, Any]:
        for name in theirs:
            settings.get(name)
        return {}

    return Entry(read, writes_nothing)
