"""What watches the loop, one observer a file; `build_observers` says which of them a recipe asks for."""

from collections.abc import Callable
from pathlib import Path

from trainwright.configs.schema import Recipe
from trainwright.trainers.observers.base import Observer


def build_observers(recipe: Recipe, folder: Path) -> list[Observer]:
    """The observers that `recipe.monitor` switches on, in the order in which the loop calls them.

    They keep the run's folder, so one process of a run has them. The report comes after the files that it is
    made of; the event `stop` has to come before `on_stop` to be in it. The goodput comes first: what the others
    take is then between the steps, and its sum at the end is said before the event `stop`.

    Raises:
        BadRequest: a tracker is switched on whose package isn't installed.
    """
    monitor = recipe.monitor
    table: list[tuple[bool, Callable[[], Observer]]] = [
        (True, lambda: _goodput(folder)),
        (True, lambda: _metrics_file(folder)),
        (True, lambda: _events_file(folder)),
        (True, _initial_norm),
        (monitor.tensorboard, lambda: _tensorboard(folder)),
        (monitor.wandb, _wandb),
        (monitor.mlflow, _mlflow),
        (True, lambda: _report(folder)),
        (True, lambda: _console(monitor.every)),
    ]
    return [build() for switched_on, build in table if switched_on]


# Each import stands in a function: a recipe pays for what it switches on, and needs no more installed.


def _goodput(folder: Path) -> Observer:
    from trainwright.trainers.observers.goodput import Goodput

    return Goodput(folder)


def _metrics_file(folder: Path) -> Observer:
    from trainwright.trainers.observers.metrics_file import MetricsFile

    return MetricsFile(folder)


def _events_file(folder: Path) -> Observer:
    from trainwright.trainers.observers.events_file import EventsFile

    return EventsFile(folder)


def _initial_norm() -> Observer:
    from trainwright.trainers.observers.initial_norm import InitialNorm

    return InitialNorm()


def _tensorboard(folder: Path) -> Observer:
    from trainwright.trainers.observers.tensorboard import TensorBoard

    return TensorBoard(folder)


def _wandb() -> Observer:
    from trainwright.trainers.observers.wandb import WandB

    return WandB()


def _mlflow() -> Observer:
    from trainwright.trainers.observers.mlflow import MLflow

    return MLflow()


def _report(folder: Path) -> Observer:
    from trainwright.trainers.observers.report import Report

    return Report(folder)


def _console(every: int) -> Observer:
    from trainwright.trainers.observers.console import console

    return console(every)
