"""Which batch killed a run, as its files tell when it is started again, and which are to be left out.

Each `start` and `resume` in events.jsonl says in which step the run had died before it (`died_in`). Two deaths
in a row in the same step, which is the same batch, make that batch the suspect. A `rollback` names the steps
whose batches it blames.

A death counts against a batch only if something shows that the process had come to it. Either a word names
it: the event `stop` of a failure comes after the step before, the event `hang` names the step itself. Or the
process left no word but had made a step since it began: it died in the one after the last line of
metrics.jsonl. Else it may have died of its start, its first step's compiling included: no batch is to blame.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.trainers.observers.json_lines import last_record, read_lines
from trainwright.trainers.platform.launched import LOST

BEGINNINGS = ("start", "resume")
AT_THE_BATCH = ("forward_backward", "agree")  # phases in which a hang may be the batch's


@dataclass
class Deaths:
    """What earlier starts of a run came to.

    died_in: the step that the last of them died in; None if it came to an end of its own, or died in its start.
    twice: whether the one before had died in it too.
    left_out: how many batches are to be left out before a step trains on the next; the loop counts them down.
    rollbacks: how often the run has been rolled back.
    """

    died_in: int | None = None
    twice: bool = False
    left_out: Counter[int] = field(default_factory=Counter)
    rollbacks: int = 0

    def __post_init__(self) -> None:
        self.blamed = frozenset(self.left_out)  # steps at which leaving a batch out was tried


def earlier_deaths(folder: Path, leave_out: bool) -> Deaths:
    """Read `events.jsonl` and `metrics.jsonl` before a new start changes them.

    leave_out: whether a batch that has killed the run twice is to be left out from now on.
    """
    events = [event for _, event in read_lines(folder / "events.jsonl")]
    left_out, rollbacks = _left_out(events)
    began = [at for at, event in enumerate(events) if event.get("event") in BEGINNINGS]
    if not began or any(map(_ended_by_itself, events[began[-1] :])):
        return Deaths(left_out=left_out, rollbacks=rollbacks)
    beginning = events[began[-1]]
    words = [step for event in events[began[-1] :] if (step := _named(event)) is not None]
    last = _step(last_record(folder / "metrics.jsonl") or {})
    died_in = words[-1] if words else last + 1 if last > _step(beginning) else None
    twice = died_in is not None and beginning.get("died_in") == died_in
    if died_in is not None and twice and leave_out:
        left_out = without(left_out, died_in, died_in)
    return Deaths(died_in, twice, left_out, rollbacks)


def _left_out(events: list[dict[str, Any]]) -> tuple[Counter[int], int]:
    """Which batches earlier starts have left out, and how often one of them was rolled back."""
    left_out, rollbacks = Counter[int](), 0
    for event in events:
        if event.get("event") == "batch_left_out":
            left_out = without(left_out, _step(event), _step(event))
        elif event.get("event") == "rollback":
            left_out = without(left_out, int(event.get("began", _step(event))), _step(event))
            rollbacks += 1
    return left_out, rollbacks


def without(left_out: Counter[int], first: int, last: int) -> Counter[int]:
    """`left_out` with the batches besides that steps `first` to `last` have trained on.

    A batch keeps its place in the stream; which step comes to it depends on how many before it are left out.
    """
    places: list[int] = []
    for step in sorted(left_out):
        begins = step + len(places)
        places += range(begins, begins + left_out[step])
    places += [
        step + sum(left_out[other] for other in left_out if other <= step) for step in range(first, last + 1)
    ]
    return Counter(place - before for before, place in enumerate(sorted(places)))


def _named(event: dict[str, Any]) -> int | None:
    """The step whose batch the event blames. That other ranks are gone says nothing of this one's batch."""
    if event.get("event") == "stop" and not LOST.search(str(event.get("reason"))):
        return _step(event) + 1
    if event.get("event") == "hang" and event.get("phase") in AT_THE_BATCH:
        return _step(event)
    return None


def _step(record: dict[str, Any]) -> int:
    return int(record.get("step", 0))


def _ended_by_itself(event: dict[str, Any]) -> bool:
    """Also a run that was rolled back, or went wrong as a whole."""
    reason = str(event.get("reason"))
    by_itself = reason == "done" or reason.startswith(("Preempted", "Keyboard", "Diverged"))
    return event.get("event") == "rollback" or (event.get("event") == "stop" and by_itself)
