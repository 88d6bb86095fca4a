"""MLflow: the metrics and the events of a run, which a restart finds again."""

import logging
import time
from dataclasses import asdict
from typing import Any

from trainwright.errors import BadRequest, RunFailed
from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.observers.json_lines import to_line
from trainwright.trainers.observers.tracking import flat, run_id, tracker

log = logging.getLogger(__name__)

TAG = "trainwright.run"
LONGEST = 5000  # characters that MLflow takes in a tag; 6000 in a parameter


class MLflow(Observer):
    """Logs to the MLflow experiment `monitor.project` at MLFLOW_TRACKING_URI.

    MLflow sends from a thread of its own, so that a slow server doesn't slow the steps. A resumed run goes on
    under the id it had, which MLflow chose; a tag leads back to it.

    Raises:
        BadRequest: mlflow isn't installed, or not what a local store needs.
        RunFailed: at the start, the server can't be reached or refuses.
    """

    def __init__(self) -> None:
        self.mlflow = tracker("mlflow")
        self.entities = tracker("mlflow.entities")
        self.client: Any = None
        self.run_id = ""

    def on_start(self, run: Run, progress: Progress) -> None:
        try:
            self._open(run, resumed=progress.step > 0 or run.again)
        except ModuleNotFoundError as error:  # MLflow's default is a local database, the extra only its client
            raise BadRequest(
                f"monitor.mlflow=true with a store on this machine needs the package {error.name}: "
                "pip install mlflow, or set MLFLOW_TRACKING_URI to a server's address"
            ) from error
        except self.mlflow.MlflowException as error:
            raise RunFailed(f"monitor.mlflow=true, but MLflow says: {error}") from error

    def _open(self, run: Run, resumed: bool) -> None:
        name = run.recipe.run.name or run.folder.name
        tag = run_id(name)
        self.client = self.mlflow.MlflowClient()
        experiment = self.mlflow.set_experiment(run.recipe.monitor.project).experiment_id
        if resumed and (
            found := self.client.search_runs([experiment], f"tags.`{TAG}` = '{tag}'", max_results=1)
        ):
            self.run_id = found[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            return  # parameters can't be changed once they are written
        self.run_id = self.client.create_run(experiment, tags={TAG: tag}, run_name=name).info.run_id
        parameters = flat({**asdict(run.recipe), "parameters": run.parameters})
        params = [self.entities.Param(key, str(value)[:LONGEST]) for key, value in parameters.items()]
        self.client.log_batch(self.run_id, params=params)

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        now = int(time.time() * 1000)
        values = {**metrics, "tokens": progress.tokens}
        points = [
            self.entities.Metric(name, value, now, progress.step)
            for name, value in values.items()
            if name != "step"
        ]
        self.client.log_batch(self.run_id, metrics=points, synchronous=False)

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        if self.client is not None:  # an event before the start is in events.jsonl
            tags = [self.entities.RunTag(f"event.{event}", to_line(fields)[:LONGEST])]
            self.client.log_batch(self.run_id, tags=tags, synchronous=False)

    def on_stop(self, progress: Progress, reason: str) -> None:
        if self.client is not None:
            try:
                self.mlflow.flush_async_logging()
                self.client.set_terminated(self.run_id, "FINISHED" if reason == "done" else "FAILED")
            except self.mlflow.MlflowException:  # the run's own folder has all of it
                log.warning("MLflow did not take the end of the run", exc_info=True)
            self.client = None
