"""What is timed: a job, described in words that a process of its own can be told."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Job(NamedTuple):
    """Describes one row of a table of the bench. It is sent to its process as JSON."""

    # The name of the row.
    name: str
    # Which function prepares it (worker.PREPARE).
    kind: str
    # Of the model that is timed: what follows --config, and the words that change its keys. Jobs
    # without a model have none.
    config: str = ""
    changes: tuple[str, ...] = ()
    # What else its kind is told.
    options: Mapping[str, Any] = {}


class Prepared(NamedTuple):
    """Holds what a process has made of a job: compiled, and run until it is as fast as it gets."""

    # What is told of it beside its time; JSON.
    facts: dict[str, Any]
    # Does once what is timed, and waits for it. It may return the seconds, where not all that it
    # does counts.
    run: Callable[[], float | None]


class Timing(NamedTuple):
    """Holds what was measured of one job."""

    facts: Mapping[str, Any]
    # Of each round.
    seconds: tuple[float, ...]
    # The most memory that its process had, in bytes.
    memory: int
