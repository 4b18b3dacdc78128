"""What a converter is given, and what it gives back."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe_jax.data.publishers.given import Given


class Converted(NamedTuple):
    """The files of one set.

    files: the path of each below the output folder, and its bytes before they are packed with gzip.
    notes: what a person should know of them, one sentence each.
    """

    files: Mapping[str, bytes]
    notes: tuple[str, ...]


class Published(NamedTuple):
    """A set as its publisher distributes it.

    what: what an example is.
    licence: the terms, in the publisher's words.
    where: addresses and packages; for a person to read.
    give: the files to name behind --from.
    direct: how the set is read without this command; "" = it is not.
    config: the config file that learns it, with its variant.
    convert: makes the files.
    """

    what: str
    licence: str
    where: str
    give: str
    direct: str
    config: str
    convert: Callable[[Given], Converted]
