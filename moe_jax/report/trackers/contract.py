"""What a tracker says of itself: a service that keeps the curves of many runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Open(Protocol):
    """A run at a tracker, while it is written to."""

    # By which the tracker finds the run again after a restart.
    identity: str
    # The URL or directory of the run, for the closing table.
    where: str

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Takes the figures of a step."""
        ...

    def close(self) -> None:
        """Sends what is left: all is sent, or on disk, when this returns."""
        ...


class Start(NamedTuple):
    """Holds what a tracker is told at the start of a run."""

    workdir: Path
    project: str
    # Flat: {"model.d_model": 128}.
    config: Mapping[str, Any]
    # Of an earlier start of the run; "" = none.
    identity: str


class Tracker(NamedTuple):
    """A service: what it needs, and how a run is opened there."""

    # What Python imports -> what pip installs.
    packages: Mapping[str, str]
    open: Callable[[Start], Open]
