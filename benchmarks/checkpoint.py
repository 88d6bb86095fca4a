"""What a checkpoint costs the training: its stall beside the same save done synchronously, and the throughput.

    python benchmarks/checkpoint.py            # about eight minutes on two cores
    python benchmarks/checkpoint.py --stretches 3

The state is that of a 46 M Llama with AdamW in fp32: more than 500 MB. Stalls: saves one after another, each
waited for; the stall is the copy, the whole is what a synchronous save would hold. Throughput: the whole
`train` path with a save every 20 steps. A save's cost is what the four steps from it on took more than the
later steps of its own stretch, so that both see the machine in the same state, over the 20 steps; quoted is the
median. With one thread the writer has a core of its own, as beside a device; with two it takes time from the
training.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STRETCH = 20  # steps
TOUCHED = 4  # of them, that a save may touch: its stall, and the steps while it is written
WARM = 2  # saves that are not counted
MARK = "measured="


def recipe_words(folder: str) -> list[str]:
    """The 34 M recipe with four layers more, on short batches."""
    return [
        "recipe=llama_34m",
        "model.num_hidden_layers=12",
        "train.seq_len=256",
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "data.validation.fraction=0",
        "health.check=false",
        f"run.dir={folder}",
        "platform=cpu",
    ]


def measure_stalls(saves: int) -> dict[str, Any]:
    """Saves that are waited for."""
    import numpy as np

    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.build import build_stepper
    from trainwright.trainers.checkpoint.place import place
    from trainwright.trainers.checkpoint.save import Saver
    from trainwright.trainers.parallel.ranks import Ranks
    from trainwright.trainers.platform.cpu import Cpu
    from trainwright.trainers.progress import Progress
    from trainwright.trainers.tasks.pretrain import Pretraining

    with tempfile.TemporaryDirectory(dir=".") as folder:
        recipe, ranks, platform = load_recipe(recipe_words(folder)), Ranks(), Cpu()
        platform.prepare()
        stepper, _ = build_stepper(recipe, Pretraining(recipe, ranks), ranks, platform, None)
        saver = Saver(place(folder), "", ranks, platform, recipe.checkpoint)
        saver.copy(stepper.state_dict())
        stalls, wholes, size = [], [], 0
        for step in range(saves + WARM):
            started = time.perf_counter()
            saver.copy(stepper.state_dict())
            stalls.append(time.perf_counter() - started)
            saver.begin(Progress(step, 0, np.zeros((1, 1), np.int64)))
            saved = saver.ended(wait=True)
            wholes.append(time.perf_counter() - started)
            assert saved is not None
            assert saved.wrong is None
            size = saved.bytes
    ratios = [stall / whole for stall, whole in zip(stalls, wholes, strict=True)]
    return {
        "megabytes": round(size / 1e6),
        "saves": saves,
        "stall_s": round(statistics.median(stalls[WARM:]), 4),
        "synchronous_s": round(statistics.median(wholes[WARM:]), 3),
        "stall_share": round(statistics.median(ratios[WARM:]), 4),
        "worst_stall_share": round(max(ratios[WARM:]), 4),
    }


def measure_throughput(saves: int) -> dict[str, Any]:
    """One run that saves at every 20th step."""
    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.observers.base import Metrics, Observer, Progress
    from trainwright.trainers.train import train

    class Clock(Observer):
        """When each step's observers were done: a stall at step N is in what N took."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step(self, progress: Progress, metrics: Metrics) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        words = [f"train.steps={STRETCH * (saves + 1) - 1}", f"checkpoint.every={STRETCH}"]
        train(load_recipe([*recipe_words(folder), *words]), [clock])
    steps = [later - earlier for earlier, later in itertools.pairwise(clock.times)]
    costs, usual = [], []
    for save in range(STRETCH - 2, len(steps) - STRETCH + 1, STRETCH):  # steps[0] is what step 2 took
        stretch = steps[save : save + STRETCH]
        usual.append(statistics.median(stretch[TOUCHED + 1 :]))
        costs.append((sum(stretch[:TOUCHED]) - TOUCHED * usual[-1]) / (STRETCH * usual[-1]))
    return {
        "saves": len(costs),
        "step_s": round(statistics.median(usual), 3),
        "cost": round(statistics.median(costs), 4),
        "costs": [round(cost, 4) for cost in costs],
    }


def in_a_process(what: str, threads: int, number: int) -> dict[str, Any]:
    """One measurement, in a process of its own with so many threads."""
    command = [sys.executable, __file__, "--measure", what, "--number", str(number)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    measured: dict[str, Any] = json.loads(line.removeprefix(MARK))
    return measured


def main() -> None:
    """Measure all, or be one of the measuring processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--stretches", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    parser.add_argument("--measure", choices=("stalls", "throughput"), help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure = measure_stalls if args.measure == "stalls" else measure_throughput
        print(MARK + json.dumps(measure(args.number)), flush=True)
        return
    rows: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    }
    rows["stall"] = in_a_process("stalls", 1, args.saves)
    print(json.dumps(rows["stall"]), flush=True)
    for threads in (1, 2):
        name = f"every_{STRETCH}_steps_{threads}_thread{'s' if threads > 1 else ''}"
        rows[name] = in_a_process("throughput", threads, args.stretches)
        print(name, json.dumps(rows[name]), flush=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
