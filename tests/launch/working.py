"""A program that stands in for training: trainwright whose `train` counts steps on a disk that all nodes share.

Each rank writes a line a step to `runs/<run.name>/<NODE>-<pid>`: the step and the number of ranks. FAULT is
STATUS:RANK:STEP, as in 76:1:3; it happens in each start that comes to that step.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from trainwright import cli
from trainwright.configs.schema import Recipe
from trainwright.errors import BadNode, BadRequest, NumericalFailure, Preempted, RunFailed
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.platform.choose import choose_platform

ERRORS = {error.status: error for error in (BadRequest, NumericalFailure, BadNode, RunFailed)}
STEP_S = 0.1


def count(recipe: Recipe):
    asked = torch.zeros(1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: asked.fill_(1))
    folder = Path(recipe.run.dir) / str(recipe.run.name)
    saved = folder / "saved"
    fault = [int(part) for part in os.environ.get("FAULT", "").split(":") if part]
    with (
        open_ranks(recipe.parallel, choose_platform("cpu")) as ranks,
        open(folder / f"{os.environ['NODE']}-{os.getpid()}", "w", buffering=1) as log,
    ):
        step = ranks.share(int(saved.read_text()) if saved.exists() else 0)
        while step < recipe.train.steps:
            step += 1
            time.sleep(STEP_S)
            if fault[1:] == [ranks.rank, step]:
                raise ERRORS[fault[0]](f"the fault at step {step}")
            stop = ranks.sum(asked.clone())
            if ranks.first:
                saved.with_suffix(".draft").write_text(str(step))
                saved.with_suffix(".draft").rename(saved)
            log.write(f"{step} {ranks.size}\n")
            if stop:
                raise Preempted(f"saved at step {step}")


if __name__ == "__main__":
    cli.VERBS["train"] = cli.Verb("", "__main__:count", "")
    sys.exit(cli.main())
