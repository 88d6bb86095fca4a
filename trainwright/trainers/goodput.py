"""Where a run's time went: from marks, over all its restarts, to seconds by cause.

A mark says what the time since the mark before was spent on, so the causes add up to the time between the first
mark and the last, whatever was killed in between:

    begin       a process of the run began: nobody trained before it. `compile`: train.compile is on.
                `again`: it is the same process, after a rollback
    start       set up, at step 0
    resume      set up, at `step` of a checkpoint
    step        trained on a batch in `step_s` seconds, `data_s` of them waiting for it. `validated`: then that
    stall       held by a save for `stall_s` seconds
    saved       waited until a checkpoint was written
    written     found that one had been written beside the training, which is no cause of its own
    validation  measured the validation loss after the last step
    sample      wrote the sample
    rollback    made a step that went wrong, and all since an earlier one is to be made again in this process
    stop        ended, for a `reason`
"""

import statistics
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

Mark = Mapping[str, Any]

CAUSES = (
    "productive",
    "redone_steps",
    "start_up",
    "compile",
    "data_wait",
    "checkpoint_stall",
    "saving",
    "validation",
    "other",
    "down",
)
FOLLOWING = 20  # steps that the first one of a process is held against


class Tally:
    """Adds up marks one by one; `seconds` may be asked for at any time."""

    def __init__(self) -> None:
        self.starts = 0
        self._totals = dict.fromkeys(CAUSES, 0.0)
        self._last: float | None = None  # the time of the newest mark
        self._saving = 0.0  # that the newest mark put down to saving
        # The steps that stand and the productive seconds up to each: a restart takes some off the end.
        self._steps = array("q")
        self._up_to = array("d")
        # Of the process at work: how its first step and those after it took, until they are enough to tell.
        self._compiles = False
        self._first: int | None = None  # where its first step stands
        self._following: list[float] = []
        self._told = False  # what of the first step wasn't training
        self._usual: float | None = None  # seconds of a step in the last process that had several

    @property
    def last(self) -> float | None:
        """The time of the newest mark."""
        return self._last

    @property
    def steps(self) -> int:
        """How many steps stand."""
        return len(self._steps)

    @property
    def restarts(self) -> int:
        return max(0, self.starts - 1)

    def add(self, mark: Mark) -> None:
        """Put the time since the mark before down to what `mark` says."""
        before = self._last if self._last is not None else mark["t"]
        seconds = max(0.0, mark["t"] - before)  # a clock that was put back between two processes
        self._last = mark["t"]
        at = mark["at"]
        if at == "begin":
            self._tell_first()
            again = bool(mark.get("again"))
            self.starts += not again
            self._compiles, self._first, self._told = bool(mark.get("compile")), None, False
            self._following = []
            self._totals["start_up" if again else "down"] += seconds
        elif at == "step":
            self._step(mark, seconds)
        elif at in ("start", "resume"):
            self._totals["start_up"] += seconds
            self._redo(int(mark.get("step", 0)))
        elif at == "stall":
            held = min(float(mark["stall_s"]), seconds)
            # Of the stall too: that the loop had to wait until the save before was written.
            waited = min(float(mark["stall_s"]) - held, self._saving)
            self._totals["saving"] -= waited
            self._totals["checkpoint_stall"] += held + waited
            self._totals["other"] += seconds - held
        else:
            self._totals[self._cause(at, mark)] += seconds
        self._saving = seconds if at == "saved" else 0.0

    def seconds(self) -> dict[str, float]:
        """Seconds by cause; their sum is the time from the first mark to the newest."""
        extra = 0.0 if self._told else self._beyond_usual()
        totals = dict(self._totals)
        totals["productive"] = (self._up_to[-1] if self._up_to else 0.0) - extra
        totals[self._cause_of_first()] += extra
        return totals

    def _cause(self, at: str, mark: Mark) -> str:
        if at in ("saved", "validation", "rollback"):
            return {"saved": "saving", "validation": "validation", "rollback": "redone_steps"}[at]
        if at == "stop" and mark.get("reason") != "done":
            # What broke the run took this long to do so: a step that never ended, a peer that was waited for.
            return "start_up" if self._first is None else "down"
        return "other"

    def _step(self, mark: Mark, seconds: float) -> None:
        busy = min(float(mark["step_s"]), seconds)
        waited = min(float(mark["data_s"]), busy)
        self._totals["data_wait"] += waited
        between = "start_up" if self._first is None else "other"
        self._totals["validation" if mark.get("validated") else between] += seconds - busy
        self._redo(int(mark["step"]) - 1)
        self._steps.append(int(mark["step"]))
        self._up_to.append((self._up_to[-1] if self._up_to else 0.0) + busy - waited)
        if self._first is None:
            self._first = len(self._steps) - 1
        elif not self._told:
            self._following.append(busy - waited)
            if len(self._following) == FOLLOWING:
                self._tell_first()

    def _redo(self, step: int) -> None:
        """What was trained beyond `step` is trained again."""
        if not self._steps or self._steps[-1] <= step:
            return
        self._tell_first()
        before = self._up_to[-1]
        while self._steps and self._steps[-1] > step:
            self._steps.pop()
            self._up_to.pop()
        self._totals["redone_steps"] += before - (self._up_to[-1] if self._up_to else 0.0)

    def _tell_first(self) -> None:
        """Take what the process's first step took beyond those after it out of the productive seconds."""
        if self._told or self._first is None:
            return
        extra = self._beyond_usual()
        self._told = True
        self._usual = statistics.median(self._following) if self._following else self._usual
        self._totals[self._cause_of_first()] += extra
        for i in range(self._first, len(self._up_to)):
            self._up_to[i] -= extra

    def _beyond_usual(self) -> float:
        """What the process's first step took beyond the usual one; nothing while no usual one is known."""
        usual = statistics.median(self._following) if self._following else self._usual
        if self._first is None or usual is None:
            return 0.0
        before = self._up_to[self._first - 1] if self._first else 0.0
        return max(0.0, self._up_to[self._first] - before - usual)

    def _cause_of_first(self) -> str:
        return "compile" if self._compiles else "start_up"


def tally(marks: Iterable[Mark]) -> Tally:
    """All of `marks` added up; what isn't a mark (half a line, another program's) is passed over."""
    total = Tally()
    for mark in marks:
        if is_mark(mark):
            total.add(mark)
    return total


def is_mark(mark: Mark) -> bool:
    """Whether `mark` has a time and what its kind needs."""
    needs = {"step": ("step", "step_s", "data_s"), "stall": ("stall_s",), "resume": ("step",)}
    names = ("t", *needs.get(str(mark.get("at")), ()))
    return isinstance(mark.get("at"), str) and all(type(mark.get(name)) in (int, float) for name in names)


def summary(total: Tally) -> dict[str, Any]:
    """What goodput.json holds; `wall_s` is the sum of `seconds` to the last digit."""
    seconds = {cause: round(value, 6) for cause, value in total.seconds().items()}
    wall = round(sum(seconds.values()), 6)
    return {
        "seconds": seconds,
        "wall_s": wall,
        "utilisation": round(seconds["productive"] / wall, 6) if wall else 0.0,
        "restarts": total.restarts,
        "steps": total.steps,
    }
