"""MLflow. MLFLOW_TRACKING_URI names the server; without it the runs are in a SQLite file of the
workdir, which `mlflow ui --backend-store-uri sqlite:///WORKDIR/mlflow.db` shows.
"""

import os
import time
from collections.abc import Mapping

from moe_jax.report.trackers.contract import Start, Tracker

# Of a run that MLflow takes at once.
PARAMETERS = 100
# Characters of a parameter.
LENGTH = 500


class Run:
    """A run at MLflow."""

    def __init__(self, start: Start):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        file = f"sqlite:///{(start.workdir / 'mlflow.db').absolute()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", file)
        self._client = MlflowClient(uri)
        self.identity = start.identity
        # A restart finds its run again, with the parameters that it has there.
        if not self.identity:
            experiment = self._client.get_experiment_by_name(start.project)
            if experiment is None:
                number = self._client.create_experiment(start.project)
            else:
                number = experiment.experiment_id
            run = self._client.create_run(number, run_name=start.workdir.name)
            self.identity = run.info.run_id
            values = [Param(key, str(value)[:LENGTH]) for key, value in start.config.items()]
            # MLflow takes so many parameters at once.
            for first in range(0, len(values), PARAMETERS):
                some = values[first : first + PARAMETERS]
                self._client.log_batch(self.identity, params=some)
        self.where = f"{uri} (run {self.identity})"

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        # MLflow counts milliseconds.
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in row.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.identity)


TRACKER = Tracker(
    packages={"mlflow": "mlflow-skinny", "sqlalchemy": "sqlalchemy", "alembic": "alembic"},
    open=Run,
)
