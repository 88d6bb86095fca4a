"""Runs on the pool's workers, and the single process that they are held against."""

import json
import os
from pathlib import Path
from typing import Any

from tests.ranks import RankPool
from trainwright.configs.compose import load_recipe
from trainwright.trainers.observers.base import Metrics, Observer, Progress
from trainwright.trainers.train import train

TIMED = {"tokens_per_s", "step_time_s", "data_time_s", "memory_gib", "mfu"}
Line = dict[str, Any]


def train_and_read(overrides: list[str]) -> list[Line] | None:
    """On every rank: the run's metrics, without what depends on the machine's speed, on rank 0."""
    recipe = load_recipe(overrides)
    train(recipe)
    return read(Path(recipe.run.dir) / recipe.run.name) if os.environ["RANK"] == "0" else None


class Killed(Exception):
    pass


class Kill(Observer):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        if progress.step == self.step:
            raise Killed


def train_until(step: int, overrides: list[str]) -> None:
    """On every rank: a run that breaks off after a step, without saving."""
    try:
        train(load_recipe(overrides), [Kill(step)])
    except Killed:
        return
    raise AssertionError("the run came to its end")


def read(folder: Path) -> list[Line]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


class Alone:
    """Single-process runs of `steps` steps, each made once, with a checkpoint every ten."""

    def __init__(self, pool: RankPool, base: list[str], steps: int) -> None:
        self.pool, self.base, self.steps = pool, base, steps
        self.runs: dict[tuple[str, ...], list[Line]] = {}

    def __call__(self, *overrides: str) -> list[Line]:
        if overrides not in self.runs:
            every = ["checkpoint.every=10", f"checkpoint.keep={self.steps // 10}", f"train.steps={self.steps}"]
            words = [*self.base, *overrides, *every, f"run.name={self.folder(*overrides).name}"]
            self.runs[overrides] = self.pool(train_and_read, 1, words)[0]
        return self.runs[overrides]

    def folder(self, *overrides: str) -> Path:
        (runs,) = (word.partition("=")[2] for word in self.base if word.startswith("run.dir="))
        return Path(runs) / "-".join(("alone", *overrides)).replace("=", "-")
