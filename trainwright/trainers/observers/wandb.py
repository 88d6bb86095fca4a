"""Weights & Biases: the metrics and the events of a run, which keeps its id over every restart."""

import json
from dataclasses import asdict
from typing import Any

from trainwright.errors import BadRequest, RunFailed
from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.observers.json_lines import to_line
from trainwright.trainers.observers.tracking import run_id, tracker


class WandB(Observer):
    """Logs to the W&B project `monitor.project`.

    Points carry `step` as a metric of its own, and the charts use it: W&B's own counter refuses to go back,
    which would drop the steps that a resumed run does again.

    Raises:
        BadRequest: wandb isn't installed or, at the start, has no login.
        RunFailed: W&B can't be reached at the start.
    """

    def __init__(self) -> None:
        self.wandb = tracker("wandb")
        self.run: Any = None

    def on_start(self, run: Run, progress: Progress) -> None:
        name = run.recipe.run.name or run.folder.name
        run.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = self.wandb.init(
                project=run.recipe.monitor.project,
                name=name,
                id=run_id(name),
                # Without a checkpoint the run starts over, and W&B overwrites a run of the same id.
                resume="allow" if progress.step or run.again else None,
                dir=str(run.folder),
                config={**asdict(run.recipe), "parameters": run.parameters},
            )
        except self.wandb.errors.UsageError as error:
            raise BadRequest(f"monitor.wandb=true, but W&B says: {error} Or set WANDB_MODE=offline.") from error
        except self.wandb.errors.Error as error:
            raise RunFailed(f"monitor.wandb=true, but W&B says: {error}") from error
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        self.run.log({**metrics, "step": progress.step, "tokens": progress.tokens})

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        if self.run is not None:  # an event before the start is in events.jsonl
            self.run.summary[f"events/{event}"] = json.loads(to_line(fields))

    def on_stop(self, progress: Progress, reason: str) -> None:
        if self.run is not None:
            self.run.finish(exit_code=0 if reason == "done" else 1)
            self.run = None
