"""metrics.jsonl: one JSON object a step, each step once, whatever was killed and resumed."""

import os
from pathlib import Path
from typing import TextIO

from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.observers.json_lines import read_lines, to_line

# The order of a line's keys; a metric that isn't here comes after them.
METRICS = (
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "param_norm",
    "tokens_per_s",
    "step_time_s",
    "data_time_s",
    "memory_gib",
    "mfu",
    "val_loss",
    "epoch",
    "samples_per_s",
)


class MetricsFile(Observer):
    """Appends a line a step to `metrics.jsonl`; steps that will be done again move aside first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.file: TextIO | None = None

    def on_start(self, run: Run, progress: Progress) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        move_aside(self.path, progress.step)
        self.file = self.path.open("a", encoding="utf-8")

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        assert self.file is not None, "on_start comes first"
        self.file.write(to_line(in_order(progress, metrics)) + "\n")
        self.file.flush()

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        # A machine that dies resumes from a checkpoint, and the lines up to it must have outlived the machine.
        if event == "checkpoint_begun" and self.file is not None:
            os.fsync(self.file.fileno())

    def on_stop(self, progress: Progress, reason: str) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def in_order(progress: Progress, metrics: Metrics) -> dict[str, float]:
    """One step's metrics with the counters of `progress`, in the order of METRICS."""
    record: Metrics = {**metrics, "step": progress.step, "tokens": progress.tokens}
    known = [name for name in METRICS if name in record]
    return {name: record[name] for name in (*known, *(name for name in record if name not in METRICS))}


def move_aside(path: Path, step: int) -> None:
    """Keep the lines of `path` up to `step`, append later ones to `metrics.redone.jsonl`, drop a torn one.

    The file is replaced whole, after the lines that leave it are on disk: a kill in between loses nothing and
    at worst puts the same lines into `metrics.redone.jsonl` twice.
    """
    if not path.exists():
        return
    fresh = path.with_name("metrics.jsonl.new")
    later: list[str] = []
    with fresh.open("w", encoding="utf-8") as kept:
        for line, record in read_lines(path):
            if record.get("step", 0) <= step:
                kept.write(line + "\n")
            else:
                later.append(line + "\n")
        _to_disk(kept)
    if later:
        with path.with_name("metrics.redone.jsonl").open("a", encoding="utf-8") as redone:
            redone.writelines(later)
            _to_disk(redone)
    os.replace(fresh, path)


def _to_disk(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
