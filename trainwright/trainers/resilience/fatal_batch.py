"""Which batch killed a run, as its files tell when it is started again, and which are to be left out.

A run that died left no word; its last line of metrics.jsonl is of the step before the one that it died in. Each
`start` and `resume` in events.jsonl says where the run had died before it (`died_in`). Two deaths in a row in
the same step, which is the same batch, make that batch the suspect.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.trainers.observers.json_lines import read_lines

BEGINNINGS = ("start", "resume")


@dataclass
class Deaths:
    """What earlier starts of a run came to.

    died_in: the step that the last of them died in; None if it came to an end of its own.
    twice: whether the one before had died in it too.
    left_out: how many batches are to be left out before a step trains on the next; the loop counts them down.
    """

    died_in: int | None = None
    twice: bool = False
    left_out: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.blamed = frozenset(self.left_out)  # steps at which leaving a batch out was tried


def earlier_deaths(folder: Path, leave_out: bool) -> Deaths:
    """Read `events.jsonl` and `metrics.jsonl` before a new start changes them.

    leave_out: whether a batch that has killed the run twice is to be left out from now on.
    """
    events = [event for _, event in read_lines(folder / "events.jsonl")]
    left_out = Counter(_step(event) for event in events if event.get("event") == "batch_left_out")
    began = [at for at, event in enumerate(events) if event.get("event") in BEGINNINGS]
    if not began or any(map(_ended_by_itself, events[began[-1] :])):
        return Deaths(left_out=left_out)
    beginning = events[began[-1]]
    steps = [_step(line) for _, line in read_lines(folder / "metrics.jsonl")]
    died_in = max([*steps[-1:], _step(beginning)]) + 1
    twice = beginning.get("died_in") == died_in
    if twice and leave_out:
        left_out[died_in] += 1
    return Deaths(died_in, twice, left_out)


def _step(record: dict[str, Any]) -> int:
    return int(record.get("step", 0))


def _ended_by_itself(event: dict[str, Any]) -> bool:
    reason = str(event.get("reason"))
    return event.get("event") == "stop" and (reason == "done" or reason.startswith(("Preempted", "Keyboard")))
