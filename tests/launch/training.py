"""Real training that takes its time, until a file `go` in `run.dir` lets it hurry."""

import sys
import time
from pathlib import Path

from trainwright import cli
from trainwright.configs.schema import Recipe
from trainwright.trainers.observers.base import Metrics, Observer, Progress
from trainwright.trainers.train import train

STEP_S = 0.4


class Slow(Observer):
    def __init__(self, go: Path):
        self.go = go

    def on_step(self, progress: Progress, metrics: Metrics):
        if not self.go.exists():
            time.sleep(STEP_S)


def slowly(recipe: Recipe):
    train(recipe, [Slow(Path(recipe.run.dir) / "go")])


if __name__ == "__main__":
    cli.VERBS["train"] = cli.Verb("", "__main__:slowly", "")
    sys.exit(cli.main())
