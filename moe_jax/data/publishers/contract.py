"""The contract of a converter, and the facts about a published data set."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe_jax.data.publishers.given import Given


class Converted(NamedTuple):
    """The files that a converter makes of one set.

    files: path below the output folder -> the content before it is packed with gzip.
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
    convert: makes the files.
    config: the config file that learns it, with its variant; "" = there is none.
    direct: how the set is read without this command; "" = it is not.
    """

    what: str
    licence: str
    where: str
    give: str
    convert: Callable[[Given], Converted]
    config: str = ""
    direct: str = ""
