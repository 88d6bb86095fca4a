"""How a run ended: from torchrun's exit status and its workers' verdicts to one status and one sentence."""

import json
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trainwright.errors import (
    INTERRUPTED,
    BadNode,
    BadRequest,
    NumericalFailure,
    Preempted,
    RunFailed,
    TrainwrightError,
)
from trainwright.launch.processes import there

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
    """What a worker left behind; no status: it runs, or was killed, by one that may have left a line.

    worked: the seconds between its first step and its last, or one of the last minute; None before the first.
    ended: when it left its status, or was first found to be gone without one; None while it runs.
    """

    rank: int
    local_rank: int
    started: float
    worked: float | None
    status: int | None
    line: str
    ended: float | None


class Ending(NamedTuple):
    """The exit status for the orchestrator, and why, in a line."""

    status: int
    line: str


class Notice(NamedTuple):
    """The signal that told the supervisor to end, and when it came."""

    signal: signal.Signals
    at: float


class Verdicts:
    """The folder that the workers of one torchrun leave their verdicts in.

    explain: why one that was killed has ended, by what was said since it started, and whether it had made a
    step; None where nobody knows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.explain: Callable[[float, bool], TrainwrightError | None] = lambda started, worked: None
        self.made = time.time()
        self._ended: dict[Path, Verdict] = {}
        self._gone: dict[Path, float] = {}  # when a worker was first found to have ended without a word

    def all(self) -> list[Verdict]:
        """Those of every worker so far."""
        found = []
        for path in self.folder.glob("*.json"):
            verdict = self._ended.get(path) or self._read(path)
            if verdict.status is not None:
                self._ended[path] = verdict
            found.append(verdict)
        return found

    def _read(self, path: Path) -> Verdict:
        gone = not there(int(path.stem.partition("-")[2]))  # asked first: it may leave its status and end now
        said = json.loads(path.read_text())
        if said["status"] is not None:
            return Verdict(**said, ended=path.stat().st_mtime)
        if not gone:
            return Verdict(**said, ended=None)
        ended = self._gone.setdefault(path, time.time())
        if not said["line"] and (error := self.explain(said["started"], said["worked"] is not None)):
            said |= {"status": error.status, "line": str(error)}
        return Verdict(**said, ended=ended)

    def last(self) -> list[Verdict]:
        """Of each of the node's places for a worker, the one that started last."""
        newest: dict[int, Verdict] = {}
        for verdict in sorted(self.all(), key=lambda verdict: verdict.started):
            newest[verdict.local_rank] = verdict
        return [newest[place] for place in sorted(newest)]

    def worked(self) -> float:
        """How many seconds the worker worked that worked longest."""
        return max((verdict.worked or 0.0 for verdict in self.all()), default=0.0)

    def idle(self) -> float:
        """How many seconds there has been no worker."""
        now = time.time()
        return now - max((now if v.ended is None else v.ended for v in self.all()), default=self.made)

    def running_at(self, moment: float) -> list[Verdict]:
        """Those of the workers that ran then."""
        return [v for v in self.all() if v.started <= moment and (v.ended is None or v.ended >= moment)]

    def final(self) -> Verdict | None:
        """The verdict of any worker so far that makes a restart useless."""
        return _first(self.all(), FINAL)


def how_it_ended(torchrun: int, verdicts: Verdicts, notice: Notice | None) -> Ending:
    """Classify an end.

    torchrun: its exit status, negative where a signal killed it.
    """
    last = verdicts.last()
    if torchrun == 0:
        return Ending(0, "done")
    if final := verdicts.final():
        return Ending(_status(final), final.line)
    if notice and notice.signal == signal.SIGINT:
        return Ending(INTERRUPTED, "interrupted")
    if notice:
        if last and all(v.status == 0 for v in last):
            return Ending(0, "done")
        return _when_told_to_end(verdicts.running_at(notice.at), notice.signal.name)
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


def _when_told_to_end(running: list[Verdict], name: str) -> Ending:
    """Whether all is saved: where no rank ran there was nothing to save that the last one hadn't."""
    if lost := next((v for v in running if v.status not in (0, SAVED)), None):
        return Ending(FAILED, lost.line if lost.status is not None else _killed(lost))
    if not running:
        return Ending(SAVED, f"{name} while no rank ran: run the same command again")
    return Ending(SAVED, f"{name}: saved, the same command goes on from there")


def _first(verdicts: Iterable[Verdict], statuses: tuple[int, ...]) -> Verdict | None:
    return next((v for status in statuses for v in verdicts if v.status == status), None)


def _status(verdict: Verdict) -> int:
    assert verdict.status is not None
    return verdict.status


def _killed(verdict: Verdict) -> str:
    return verdict.line or (
        f"rank {verdict.rank} ended without a word, which usually means that it was killed, for example "
        "because its machine ran out of memory"
    )
