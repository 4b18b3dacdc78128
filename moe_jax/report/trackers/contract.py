"""What a tracker says of itself: a service that keeps the curves of many runs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Open(Protocol):
    """A run at a tracker, while it is written to."""

    identity: str  # by which the tracker finds the run again after a restart
    where: str  # the URL or directory of the run, for the closing table

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Takes the figures of a step."""
        ...

    def close(self) -> None:
        """All is sent, or on disk, when this returns."""
        ...


class Start(NamedTuple):
    """Holds what a tracker is told at the start of a run."""

    workdir: Path
    project: str
    config: Mapping[str, Any]  # flat: {"model.d_model": 128}
    identity: str  # of an earlier start of the run; "" = none


class Tracker(NamedTuple):
    """A service: what it needs, and how a run is opened there."""

    packages: Mapping[str, str]  # what Python imports -> what pip installs
    open: Callable[[Start], Open]
