"""How a run ended: from torchrun's exit status and its workers' verdicts to one status and one sentence."""

import json
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainwright.errors import BadNode, BadRequest, NumericalFailure, Preempted, RunFailed

INTERRUPTED = 130
# What trying again on this node can't mend: as soon as a worker says so, torchrun, which would try, is ended.
FINAL = (BadRequest.status, NumericalFailure.status, BadNode.status)
SAVED, FAILED = Preempted.status, RunFailed.status

MEANING = {
    FAILED: "failed, worth a retry",
    BadRequest.status: "bad request",
    SAVED: "preempted, its state saved",
    NumericalFailure.status: "stopped for numerical reasons",
    BadNode.status: "bad node",
    INTERRUPTED: "interrupted",
}


@dataclass(frozen=True)
class Verdict:
    """What a worker left behind, and when; no status: it runs, or was killed."""

    rank: int
    local_rank: int
    started: float
    status: int | None
    line: str
    left: float


class Ending(NamedTuple):
    """The exit status for the orchestrator, and why, in a line."""

    status: int
    line: str


class Verdicts:
    """The folder that the workers of one torchrun leave their verdicts in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made = time.time()
        self._final: dict[Path, Verdict] = {}

    def last(self) -> list[Verdict]:
        """Of each of the node's places for a worker, the one that started last."""
        newest: dict[int, Verdict] = {}
        for path in self.folder.glob("*.json"):
            verdict = self._final.get(path) or Verdict(
                **json.loads(path.read_text()), left=path.stat().st_mtime
            )
            if verdict.status is not None:
                self._final[path] = verdict
            before = newest.get(verdict.local_rank)
            if before is None or before.started < verdict.started:
                newest[verdict.local_rank] = verdict
        return [newest[place] for place in sorted(newest)]

    def longest(self) -> float:
        """How many seconds the worker of the last ones lived that lived longest."""
        return max((self._end(verdict) - verdict.started for verdict in self.last()), default=0.0)

    def idle(self) -> float:
        """How many seconds there has been no worker."""
        return time.time() - max(map(self._end, self.last()), default=self.made)

    def _end(self, verdict: Verdict) -> float:
        return time.time() if verdict.status is None else verdict.left

    def final(self) -> Verdict | None:
        """The verdict of any worker so far that makes a restart useless."""
        self.last()
        return _first(self._final.values(), FINAL)


def how_it_ended(torchrun: int, verdicts: Verdicts, asked: signal.Signals | None) -> Ending:
    """Classify an end.

    torchrun: its exit status, negative where a signal killed it.
    asked: the signal that told the supervisor to end.
    """
    last = verdicts.last()
    if torchrun == 0:
        return Ending(0, "done")
    if final := verdicts.final():
        return Ending(_status(final), final.line)
    if asked == signal.SIGINT:
        return Ending(INTERRUPTED, "interrupted")
    if asked:
        return _when_told_to_end(last, asked)
    if torchrun < 0:
        return Ending(FAILED, f"torchrun was killed by {signal.Signals(-torchrun).name}")
    for status in (FAILED, INTERRUPTED):
        if verdict := _first(last, (status,)):
            return Ending(status, verdict.line)
    if killed := next((v for v in last if v.status is None), None):
        return Ending(FAILED, _killed(killed))
    if last and all(v.status == SAVED for v in last):
        return Ending(SAVED, last[0].line)
    when = "after its ranks had ended" if last else "before a rank had started"
    return Ending(FAILED, f"torchrun ended with status {torchrun} {when}")


def _when_told_to_end(last: list[Verdict], asked: signal.Signals) -> Ending:
    """Whether all is saved: with no rank there is nothing to save that the last one hadn't."""
    if last and all(v.status == 0 for v in last):
        return Ending(0, "done")
    if lost := next((v for v in last if v.status not in (0, SAVED)), None):
        return Ending(FAILED, lost.line if lost.status is not None else _killed(lost))
    return Ending(SAVED, f"{asked.name}: saved, the same command goes on from there")


def _first(verdicts: Iterable[Verdict], statuses: tuple[int, ...]) -> Verdict | None:
    return next((v for status in statuses for v in verdicts if v.status == status), None)


def _status(verdict: Verdict) -> int:
    assert verdict.status is not None
    return verdict.status


def _killed(verdict: Verdict) -> str:
    return (
        f"rank {verdict.rank} ended without a word, which usually means that it was killed, for example "
        "because its machine ran out of memory"
    )
