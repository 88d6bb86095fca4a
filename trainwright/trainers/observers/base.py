"""What watches the loop: one small class a file, called in the order of the list."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainwright.configs.schema import Recipe
from trainwright.trainers.progress import Progress

__all__ = ["Metrics", "Observer", "Observers", "Progress", "Run"]

Metrics = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What is fixed for a run's whole life, as its observers see it."""

    recipe: Recipe
    folder: Path  # runs/<run.name>
    total_steps: int | None  # None where only the data's end stops the run
    parameters: int
    ranks: int
    emit: Callable[..., None]  # emit("checkpoint", step=100, path=...): an event, to every observer
    again: bool = False  # after a rollback, in the same process


class Observer:
    """The seam between the loop and what watches it. Every method does nothing; override what is needed."""

    def on_start(self, run: Run, progress: Progress) -> None:
        """Before the first step; `progress.step` is above 0 on a resumed run."""

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        """After an optimizer step, with that step's line of metrics.jsonl."""

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        """Something happened: start, resume, checkpoint, stop, ..."""

    def on_stop(self, progress: Progress, reason: str) -> None:
        """Once, however the run ends; `reason` is `done` or what broke it.

        A run that is rolled back begins again, with `on_start`, in the same process.
        """


class Observers(Observer):
    """A list of observers that is called as one."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self.observers = observers

    def emit(self, event: str, **fields: object) -> None:
        """Tell every observer of an event."""
        self.on_event(event, fields)

    def on_start(self, run: Run, progress: Progress) -> None:
        for observer in self.observers:
            observer.on_start(run, progress)

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        for observer in self.observers:
            observer.on_step(progress, metrics)

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        for observer in self.observers:
            observer.on_event(event, fields)

    def on_stop(self, progress: Progress, reason: str) -> None:
        for observer in self.observers:
            observer.on_stop(progress, reason)
