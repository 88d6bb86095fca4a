"""A live display of a run, for a terminal."""

from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.observers.console_lines import QUIET
from trainwright.trainers.observers.time_left import TimeLeft, duration

# What stands below the bar: the metric, its label, its format.
BELOW = (
    ("loss", "loss", ".4f"),
    ("val_loss", "val", ".4f"),
    ("tokens_per_s", "tok/s", ",.0f"),
    ("lr", "lr", ".2e"),
)


class StepBar(Bar):
    """Rich's progress bar with a line of values below it, so that both have room in 80 columns."""

    values = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.values:
            yield self.values


class ConsoleDisplay(Observer):
    """A bar of steps and the newest values at the bottom; validated steps and events scroll above them."""

    def __init__(self, stream: TextIO) -> None:
        self.bar = StepBar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green", pulse_style="cyan"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", style="dim"),
            console=Console(file=stream, highlight=False),
            expand=True,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task("", visible=False, left="")
        self.time_left = TimeLeft(None)
        self.newest: Metrics = {}

    def on_start(self, run: Run, progress: Progress) -> None:
        self.time_left = TimeLeft(run.total_steps)
        name = run.recipe.run.name or run.folder.name
        self.bar.update(
            self.task, description=name, total=run.total_steps, completed=progress.step, visible=True
        )
        self.bar.start()

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        self.newest |= metrics  # the last validation loss stays in sight
        left = self.time_left.after(progress.step)
        self.bar.values = below_the_bar(self.newest)
        self.bar.update(self.task, completed=progress.step, left=f"{duration(left)} left" if left else "")
        if "val_loss" in metrics:
            values = f"loss {metrics['loss']:.4f}  val {metrics['val_loss']:.4f}"
            self._print(f"step {progress.step}", "", values)

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        if event in QUIET:
            return
        if event == "sample":
            self._print(event)
            prompt, continued = (str(fields.get(key, "")) for key in ("prompt", "text"))
            text = Text.assemble((prompt, "dim"), continued)
            self.bar.console.print(Padding(text, (0, 0, 0, 2)))
            return
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in fields.items()}
        values = "  ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
        self._print(event, "dim", values)

    def on_stop(self, progress: Progress, reason: str) -> None:
        self.bar.stop()

    def _print(self, name: str, style: str = "", values: str = "") -> None:
        self.bar.console.print(Text(f"{name:<12}", "cyan").append(values, style), soft_wrap=True)


def below_the_bar(metrics: Metrics) -> Text:
    """`loss 2.3450  val 2.4010  tok/s 12,345  lr 3.00e-04`, without what isn't known."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, label, spec in BELOW:
        if name in metrics:
            text.append("  " if text else "").append(f"{label} ", "dim").append(f"{metrics[name]:{spec}}")
    return text
