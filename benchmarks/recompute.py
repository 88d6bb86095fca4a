"""What activation checkpointing saves and costs: peak memory and step time of a few lists of what is kept.

    python benchmarks/recompute.py             # about three minutes on one core

The 34 M Llama of the speed benchmark on longer sequences, fp32, a micro-batch of 4 x 1024. Each row is a
process of its own; they take turns step by step, so that all see the machine in the same state. Memory: the
peak of the process less what it held before its first step, so without weights and optimizer's state:
activations, gradients and scratch. Time: of the processor on one thread, so that other work on the machine
doesn't count. Quoted: medians, and the median of the ratios of neighbouring steps to the first row's.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "recompute.json"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "recompute.png"
WARM = 1  # steps that are not counted
MARK = "measured="


class Row(NamedTuple):
    """A mode of `train.activation_checkpointing`, and with `selective` what `train.recompute_keep` names."""

    mode: str
    keep: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As it is typed."""
        return f"{self.mode} [{', '.join(self.keep)}]" if self.keep else self.mode

    @property
    def words(self) -> list[str]:
        """The recipe's overrides."""
        kept = [f"train.recompute_keep=[{','.join(self.keep)}]"] if self.keep else []
        return [f"train.activation_checkpointing={self.mode}", *kept]


ROWS = (
    Row("none"),
    Row("selective", ("matmul", "attention")),
    Row("selective", ("attention", "qkv_proj", "o_proj")),
    Row("selective", ("attention",)),
    Row("full"),
)
SHAPE = (
    "recipe=llama_34m",
    "train.seq_len=1024",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "data.validation.fraction=0",
)


def measure(words: list[str], steps: int) -> None:
    """Do a step whenever told to; say its processor time and the peak so far."""
    import numpy as np
    import torch

    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.build import build_stepper
    from trainwright.trainers.data.batch import Batch
    from trainwright.trainers.parallel.ranks import Ranks
    from trainwright.trainers.platform.cpu import Cpu
    from trainwright.trainers.tasks.pretrain import Pretraining

    recipe, platform = load_recipe([*SHAPE, *words]), Cpu()
    platform.prepare()
    stepper, _ = build_stepper(recipe, Pretraining(recipe, Ranks()), Ranks(), platform, None)
    rows, length = recipe.train.global_batch_size, recipe.train.seq_len
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, recipe.model.vocab_size, (rows, length + 1), generator=generator)
    # Four documents a sequence, as packing would have it.
    documents = (torch.arange(length) * 4 // length).int().repeat(rows, 1)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], documents, np.zeros((rows, 1), np.int64), 0.0)
    before = resident_gib()
    for _ in range(steps):
        started = time.process_time()
        stepper.forward_backward(batch, tokens[:, 1:].numel())
        squares = stepper.squares()
        stepper.update(1e-4, squares[0].sqrt(), recipe.optim.clip)
        seconds = time.process_time() - started
        print(MARK + json.dumps([seconds, platform.memory_gib() - before]), flush=True)
        sys.stdin.readline()


def resident_gib() -> float:
    """What the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


class Side:
    """A row's process."""

    def __init__(self, row: Row, steps: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--steps", str(steps), "--measure", *row.words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def step(self) -> tuple[float, float]:
        """Wait for the step that is under way: its processor seconds, and the peak in GiB."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                seconds, gib = json.loads(line.removeprefix(MARK))
                return seconds, gib
        raise RuntimeError(f"{self.process.args!r} ended with {self.process.wait()}")

    def go(self) -> None:
        """Let the next step begin."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def by_turns(steps: int) -> list[list[tuple[float, float]]]:
    """Of each row, the seconds and the peak after each step."""
    sides: list[Side] = []
    measured: list[list[tuple[float, float]]] = []
    try:
        for row in ROWS:  # one after the other up to the end of its first step, where it waits
            sides.append(Side(row, steps))
            measured.append([sides[-1].step()])
        for _ in range(steps - 1):
            for side, own in zip(sides, measured, strict=True):
                side.go()
                own.append(side.step())
    finally:
        for side in sides:
            side.process.kill()
            side.process.wait()
    return measured


def summary(measured: list[list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A line of the table for each row."""
    first = [seconds for seconds, _ in measured[0][WARM:]]
    rows = []
    for row, own in zip(ROWS, measured, strict=True):
        seconds = [step for step, _ in own[WARM:]]
        ratios = [step / other for step, other in zip(seconds, first, strict=True)]
        rows.append(
            {
                "row": row.name,
                "peak_gib": round(own[-1][1], 3),
                "step_s": round(statistics.median(seconds), 3),
                "times_none": round(statistics.median(ratios), 3),
            }
        )
    return rows


def as_markdown(results: Mapping[str, Any]) -> str:
    """The table of a page."""
    lines = ["| mode and what is kept | peak, GiB | step, s | times `none` |", "|---|--:|--:|--:|"]
    for row in results["rows"]:
        figures = f"{row['peak_gib']:.2f} | {row['step_s']:.2f} | {row['times_none']:.2f}"
        lines.append(f"| `{row['row']}` | {figures} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Any]) -> None:
    """docs/images/recompute.png: the table as bars."""
    import matplotlib.pyplot as plt

    names = [row["row"] for row in results["rows"]]
    figure, sides = plt.subplots(1, 2, figsize=(9.5, 2.8), dpi=75, sharey=True, layout="constrained")
    for axes, key, title in zip(sides, ("peak_gib", "step_s"), ("Peak, GiB", "Step, s"), strict=True):
        axes.barh(names, [row[key] for row in results["rows"]], color="tab:blue")
        axes.set_title(title)
    sides[0].invert_yaxis()
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE)
    plt.close(figure)


def main() -> None:
    """Measure the table, or be one row of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.steps)
        return
    rows = summary(by_turns(args.steps))
    machine = {"cpu": platform.processor() or platform.machine(), "threads": 1}
    results = {"machine": machine, "steps": args.steps, "shape": list(SHAPE), "rows": rows}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    print(as_markdown(results))


if __name__ == "__main__":
    main()
