"""ledger.jsonl and goodput.json: every second of a run, over all its restarts, put down to a cause."""

import json
import os
import time
from pathlib import Path
from typing import BinaryIO

from trainwright.trainers.goodput import Tally, summary, tally
from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.observers.json_lines import end_torn_line, read_lines

# The time of the clock when this module came in; the monotonic clock goes on from there, so that a clock that
# is set while the run is under way takes no second from it and gives it none.
_CLOCK = time.time() - time.monotonic()
_IMPORTED = time.monotonic()
_process_is_taken = False  # a process that trains a second time didn't begin for that

MARKED = {"validation": "validation", "sample": "sample", "rollback_begun": "rollback"}  # by event


class Goodput(Observer):
    """Writes a mark for each step and each event that took time, and sums at checkpoints and at the stop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.began = take_process_start()
        self.tally = Tally()
        self.file: BinaryIO | None = None

    def on_start(self, run: Run, progress: Progress) -> None:
        self.run = run
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "ledger.jsonl"
        self.tally = tally(record for _, record in read_lines(path))
        self.file = path.open("ab+")
        end_torn_line(self.file)
        now, last = _now(), self.tally.last
        # A process that stood ready before the one before it died trained nothing until then. A last mark that
        # is still to come is of a clock that was set back since.
        began = max(self.began, last) if last is not None and last <= now else self.began
        again = {"again": True} if run.again else {}
        self._mark("begin", t=began, compile=run.recipe.train.compile, **again)

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        validated = {"validated": True} if "val_loss" in metrics else {}
        self._mark(
            "step",
            step=progress.step,
            step_s=round(metrics["step_time_s"], 6),
            data_s=round(metrics["data_time_s"], 6),
            **validated,
        )

    def on_event(self, event: str, fields: dict[str, object]) -> None:
        if self.file is None:
            return
        if event in ("start", "resume"):
            self._mark(event, step=fields.get("step", 0))
        elif event == "checkpoint_begun":
            self._mark("stall", stall_s=fields["stall_s"])
        elif event == "checkpoint":
            # A save that ended beside the training took no time from it.
            self._mark("saved" if fields.get("waited") else "written")
            self._write()
        elif event in MARKED:
            self._mark(MARKED[event])
        elif event == "stop":
            self._mark("stop", reason=fields.get("reason"))
            self._write()
            found = summary(self.tally)
            seconds = {cause: round(value, 3) for cause, value in found["seconds"].items() if value >= 5e-4}
            whole = {name: found[name] for name in ("utilisation", "wall_s", "restarts")}
            self.run.emit("goodput", **whole, **seconds)

    def on_stop(self, progress: Progress, reason: str) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _mark(self, at: str, t: float | None = None, **fields: object) -> None:
        assert self.file is not None, "on_start comes first"
        mark = {"t": round(_now() if t is None else t, 6), "at": at, **fields}
        self.tally.add(mark)
        self.file.write(json.dumps(mark).encode() + b"\n")
        self.file.flush()

    def _write(self) -> None:
        """goodput.json, whole or as it was."""
        fresh = self.folder / "goodput.json.new"
        fresh.write_text(json.dumps(summary(self.tally), indent=2) + "\n", encoding="utf-8")
        os.replace(fresh, self.folder / "goodput.json")


def _now() -> float:
    return _CLOCK + time.monotonic()


def take_process_start() -> float:
    """When this process began, for the first run that it trains; for another one, now."""
    global _process_is_taken
    taken, _process_is_taken = _process_is_taken, True
    return _now() if taken else process_start()


def process_start() -> float:
    """The time at which this process began: Linux tells; elsewhere, when this module was imported."""
    try:
        stat = Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])  # field 22; the second, the name, may hold spaces
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _CLOCK + _IMPORTED
    return _now() - max(0.0, age)
