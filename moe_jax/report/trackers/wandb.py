"""Weights & Biases. Its own variables hold: WANDB_MODE=offline keeps the run on disk, to be sent by
`wandb sync`; WANDB_ENTITY, WANDB_API_KEY and the others are read by its library.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.report.trackers.contract import Start, Tracker


class Run:
    """A run at W&B."""

    def __init__(self, start: Start):
        import wandb

        settings = wandb.Settings(silent=True, console="off", disable_git=True)
        self._run: Any = wandb.init(
            project=start.project,
            name=start.workdir.name,
            dir=str(start.workdir),
            config=dict(start.config),
            id=start.identity or None,
            resume="allow",
            settings=settings,
        )
        # A restart makes some steps again, and W&B would refuse rows behind its own counter.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.identity = str(self._run.id)
        self.where = str(self._run.dir if self._run.offline else self._run.url)

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        self._run.log({"step": step, **row})

    def close(self) -> None:
        self._run.finish()


TRACKER = Tracker(packages={"wandb": "wandb"}, open=Run)
