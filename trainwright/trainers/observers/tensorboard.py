"""tensorboard/: the metrics as scalars under their own names, the events as text, spikes as their length."""

from pathlib import Path
from typing import Any

from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.observers.json_lines import to_line


class TensorBoard(Observer):
    """Writes `tensorboard/`; on a resumed run TensorBoard drops what it had past the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "tensorboard"
        self.writer: Any = None
        self.step = 0

    def on_start(self, run: Run, progress: Progress) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.step = progress.step
        # Everything from purge_step on is dropped; 0 on a run that starts afresh in an old folder.
        purge_step = progress.step + 1 if progress.step else 0
        self.writer = SummaryWriter(str(self.folder), purge_step=purge_step, flush_secs=30)  # type: ignore[no-untyped-call]

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        self.step = progress.step
        for name, value in metrics.items():
            if name != "step":
                self.writer.add_scalar(name, value, progress.step)

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        if self.writer is not None:  # an event before the start is in events.jsonl
            # Indented: Markdown's code block, so that a path keeps its underscores.
            self.writer.add_text(f"events/{event}", "    " + to_line(fields), self.step)
            if event == "spike":
                self.writer.add_scalar("spike_length", fields["length"], fields["step"])

    def on_stop(self, progress: Progress, reason: str) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
