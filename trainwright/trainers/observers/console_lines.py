"""One `key=value` line a step, for logs.

People, SageMaker metric definitions and log-pattern monitors read the same line, so it is stable: its keys are
the names of the metrics, `step` and `loss` come first, and what isn't known is left out. A step is found by
`step=(\\d+) loss=([0-9.]+)`, any other metric by `\\bNAME=([0-9.e+-]+)`.
"""

import json
import re
from typing import TextIO

from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.observers.time_left import TimeLeft, duration

# How a metric is written, in the order of the line: first what every step has, then what only some have.
FORMATS = {
    "loss": ".4f",
    "lr": ".2e",
    "grad_norm": ".3f",
    "param_norm": ".3f",
    "tokens_per_s": ".0f",
    "step_time_s": ".3f",
    "data_time_s": ".3f",
    "memory_gib": ".2f",
    "tokens": ".0f",
    "mfu": ".3f",
    "val_loss": ".4f",
    "epoch": ".3g",
    "samples_per_s": ".1f",
}


# Events for the files: another one follows where there is news.
QUIET = ("checkpoint_begun", "rollback_begun", "ranks")


class ConsoleLines(Observer):
    """Prints every `every`-th step, and always the first, the last, the validated ones, and the events."""

    def __init__(self, every: int, stream: TextIO) -> None:
        self.every = every
        self.stream = stream
        self.time_left = TimeLeft(None)
        self.first = True
        self.held = ""  # the newest step's line while it isn't printed: it may turn out to be the last

    def on_start(self, run: Run, progress: Progress) -> None:
        self.time_left = TimeLeft(run.total_steps)
        self.first = True

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        self.held = step_line(progress, metrics, self.time_left.after(progress.step))
        if self.first or progress.step % self.every == 0 or "val_loss" in metrics:
            self._print_held()
        self.first = False

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        if event in QUIET:
            return
        if event in ("goodput", "stop"):  # the end of the run comes after its last step
            self._print_held()
        pairs = {"event": event, **fields}
        self._print(" ".join(f"{key}={_word(value)}" for key, value in pairs.items() if value is not None))

    def on_stop(self, progress: Progress, reason: str) -> None:
        self._print_held()

    def _print_held(self) -> None:
        if self.held:
            self._print(self.held)
            self.held = ""

    def _print(self, line: str) -> None:
        print(line, file=self.stream, flush=True)


def step_line(progress: Progress, metrics: Metrics, seconds_left: float | None) -> str:
    """`step=120 loss=2.3450 lr=3.00e-04 ... left=4m10s`; a metric without a format of its own goes last."""
    values: Metrics = {**metrics, "tokens": progress.tokens}
    formats = {**FORMATS, **{name: ".4g" for name in values if name not in FORMATS and name != "step"}}
    words = [f"{name}={values[name]:{spec}}" for name, spec in formats.items() if name in values]
    left = [f"left={duration(seconds_left)}"] if seconds_left is not None else []
    return " ".join([f"step={progress.step}", *words, *left])


def _word(value: object) -> str:
    """A value as one word: quoted as in JSON where it has spaces, line breaks or quotes in it."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if re.fullmatch(r'[^\s"]+', text) else json.dumps(text, ensure_ascii=False)
