"""Trackers: services that keep the curves of many runs. `log.trackers` names those of a run.

To add one, write its file with a TRACKER and add its line. A tracker that fails is left, with one
line: the figures of a run are in metrics.jsonl.
"""

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.report.trackers import mlflow, wandb
from moe_jax.report.trackers.contract import Open, Start, Tracker

TRACKERS: dict[str, Tracker] = {
    "mlflow": mlflow.TRACKER,
    "wandb": wandb.TRACKER,
}
# Of the workdir: where the run is at each tracker.
FILE = "tracking.json"
# A chart for each figure of each layer would be thousands: of the layers the extremes are sent.
LAYER = re.compile(r"moe/layer_\d+/(.*)")
# Names that are sent of a run; the first that come.
MOST = 200


def require(names: Sequence[str]) -> None:
    """Raises UserError for a name that is no tracker, or whose library is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f'log.trackers has "{name}", which is none of {", ".join(TRACKERS)}')
        packages = TRACKERS[name].packages
        missing = [packages[m] for m in packages if importlib.util.find_spec(m) is None]
        if missing:
            raise UserError(
                f'log.trackers = "{name}" needs {" and ".join(missing)} (not installed): '
                f"pip install {' '.join(missing)}, or install moe_jax with its extra [track]"
            )


def capped(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of a row, and of figures of single layers the extremes alone."""
    # Of each figure the values of all layers.
    layers: dict[str, list[float]] = {}
    kept = {}
    for name, value in row.items():
        # No tracker draws text, and few take a NaN.
        if not (isinstance(value, int | float) and math.isfinite(value)):
            continue
        match = LAYER.fullmatch(name)
        if match:
            layers.setdefault(match[1], []).append(float(value))
        else:
            kept[name] = float(value)
    for figure, values in layers.items():
        kept[f"moe/layers_min/{figure}"] = min(values)
        kept[f"moe/layers_max/{figure}"] = max(values)
    return kept


class Trackers:
    """The trackers of a run, all of them written to alike.

    Args:
      names: of TRACKERS.
      start: what they are told; `identity` is read from the workdir.
      say: takes one line, when a tracker fails.
    """

    def __init__(self, names: Sequence[str], start: Start, say: Any):
        self._say, self._sent = say, set[str]()
        self._open: dict[str, Open] = {}
        self.where: dict[str, str] = {}
        path = start.workdir / FILE
        known = _identities(path)
        for name in names:
            # A tracker that knew the run before goes on with the same curves.
            own = start._replace(identity=known.get(name, {}).get("identity", ""))
            try:
                own_run = TRACKERS[name].open(own)
            # Whatever its library, its server or the network raises.
            except Exception as error:
                self._leave(name, error)
                continue
            self._open[name], self.where[name] = own_run, own_run.where
            known[name] = {"identity": own_run.identity, "where": own_run.where}
        if self._open:
            path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

    def scalars(self, step: int, row: Mapping[str, Any]) -> None:
        """Sends the figures of a step."""
        if not self._open:
            return
        sent = {}
        for name, value in capped(row).items():
            # A name that was sent once is always sent, so no curve has holes.
            if name in self._sent or len(self._sent) < MOST:
                self._sent.add(name)
                sent[name] = value
        # A copy of the names: a tracker that fails is taken out meanwhile.
        for name in list(self._open):
            try:
                self._open[name].scalars(step, sent)
            except Exception as error:
                self._leave(name, error)

    def close(self) -> None:
        """Ends the run at every tracker; one that fails then is told, and no more."""
        for name in list(self._open):
            try:
                self._open[name].close()
            except Exception as error:
                self._leave(name, error)
        self._open = {}

    def _leave(self, name: str, error: Exception) -> None:
        """Goes on without a tracker, and says why in a line."""
        self._open.pop(name, None)
        text = " ".join(str(error).split())[:200]
        self._say(f"{name} is left ({type(error).__name__}: {text}); metrics.jsonl has all figures")


def _identities(path: Path) -> dict[str, dict[str, str]]:
    """Returns {tracker: {"identity", "where"}} of an earlier start of the run."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
