"""Ends a rank whose main thread makes no progress, so that the launcher starts the run again.

Each rank has two daemon threads. One beats: every few seconds it writes into the launcher's store where the
main thread is. The other watches the main thread. When that has been in one place for longer than its bound,
one of the ranks reads all beats twice and judges whom the others wait for; then all ranks that can write their
stacks and end.

A main thread that is stuck in C++ with Python's lock stops both threads: its beats stop, and a timer of
faulthandler, which needs no lock, ends the process if nobody else does. A stopped process can't even that: its
supervisor ends it, for it promises at each look when the next one comes (`verdict.promise`).
"""

import faulthandler
import math
import os
import secrets
import signal
import statistics
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from trainwright.configs.schema import ResilienceConfig
from trainwright.trainers.node import node_name
from trainwright.trainers.observers.base import Metrics, Observer, Progress
from trainwright.trainers.observers.events_file import EventsFile
from trainwright.trainers.parallel import first_failure
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.resilience.beats import Beats, Judgement
from trainwright.trainers.resilience.stacks import all_stacks, collective, in_debugger, place
from trainwright.trainers.resilience.straggler import Beat, Finding, judge
from trainwright.trainers.resilience.whereabouts import Where, Whereabouts
from trainwright.trainers.within import Unanswered, within
from trainwright.verdict import leave, promise, promise_no_more

LOOK = 1.0  # seconds between two looks at the main thread
LATE = 5.0  # a look that comes so much too late: the process or the machine was suspended
REACH = 5.0  # seconds that the store, a disk or the device's library has to answer: each may be what hangs
PARTING = 2.0  # seconds between the finding and the end, in which all ranks learn of it and write their stacks
# Of the timer beyond the bound: the ranks that can speak have spoken by then, and ended this one if they could.
MARGIN = 30.0
QUIET = 5.0  # seconds beyond the bound after which the supervisor ends a process that hasn't looked any more
FOREVER = 1e9
DEBUGGERS = ("debugpy", "pydevd")


class Peer(NamedTuple):
    """A rank's process. Those with the same `launcher` may signal each other: same pids, same user."""

    launcher: str
    pid: int
    keys: str


class Passing(Observer):
    """Stands between the observers of a list, to say that the main thread comes to those after it."""

    def __init__(self, where: Whereabouts, phase: str) -> None:
        self.where, self.phase = where, phase

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        self.where.at(self.phase, progress.step)


class Watchdog:
    """Watches the thread that makes it, as a context; all ranks make theirs at the same place.

    where: what the loop tells where it is. folder: the run's.
    """

    def __init__(self, limits: ResilienceConfig, folder: Path, ranks: Ranks, platform: Platform) -> None:
        self.where = Whereabouts(platform.work_clock())
        self.limits, self.folder, self.ranks, self.platform = limits, folder, ranks, platform
        # Not the host's name alone: pods may share it without sharing pids.
        launcher = f"{node_name()}/{os.environ.get('GROUP_RANK', '')}/{os.getppid()}"
        # Keys are drawn: the launcher's count of restarts differs between nodes, and its store may stay.
        own = Peer(launcher, os.getpid(), secrets.token_hex(8))
        self.peers: list[Peer] = ranks.gather(own)
        self.beats = Beats(f"trainwright/watchdog/{self.peers[0].keys}", ranks.rank, ranks.size)
        self._main = threading.get_ident()
        self._debugged = sys.gettrace() is not None or any(name in sys.modules for name in DEBUGGERS)
        self._woke = -math.inf  # when the process was last found to have been suspended
        self._judges = self._speaks = self._alone = False
        self._dumps: IO[str] | None = None
        self._closed = threading.Event()
        _dump_on_request(2)
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if ranks.size > 1:
            beat = self.beats.beat, (self._own_beat, self._closed)
            self._threads.append(threading.Thread(target=beat[0], args=beat[1], name="heartbeat", daemon=True))
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Whereabouts:
        return self.where

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        self._threads[0].join(REACH)
        promise_no_more()
        faulthandler.cancel_dump_traceback_later()
        if hasattr(faulthandler, "unregister"):
            faulthandler.unregister(signal.SIGUSR2)
        if self._dumps:
            self._dumps.close()
            with suppress(OSError):
                if self._stacks.stat().st_size == 0:
                    self._stacks.unlink()
                    self._stacks.parent.rmdir()

    def bound(self, phase: str) -> float:
        """How many seconds the main thread may be in `phase`.

        A part of a step may take as long as several whole ones. What comes before the second step (loading,
        compiling), a validation and a save may take as long as a start.
        """
        times = tuple(self.where.steps)
        if not times or phase in ("start_up", "validation", "save"):
            return self.limits.start_up_s
        return max(self.limits.hang_floor_s, self.limits.hang_factor * statistics.median(times))

    def left(self, where: Where) -> float:
        """Seconds until the bound is reached."""
        if self._debugged or in_debugger(self._main):
            return FOREVER
        return self.bound(where.phase) - (time.monotonic() - max(where.at, self._woke))

    @property
    def _stacks(self) -> Path:
        return self.folder / "stacks" / f"rank_{self.ranks.rank:05d}.txt"

    def _own_beat(self, number: int) -> Beat:
        where, waits = self.where.now, collective(self._main)
        spot = waits or place(self._main)
        return Beat(number, time.time(), where.step, where.phase, bool(waits), spot, round(self.left(where), 1))

    def _watch(self) -> None:
        pause = min(LOOK, self.limits.hang_floor_s / 4)
        looked = ask_at = time.monotonic()
        while not self._closed.wait(pause):
            if time.monotonic() - looked > pause + LATE:
                self._woke = time.monotonic()
            where = self.where.now
            left = self.left(where)
            self._set_timer(max(left, 0.0) + MARGIN)
            promise(left + QUIET if left > 0 else MARGIN)  # with time to judge, and to say so
            if left > 0:
                self._release()
            elif time.monotonic() >= ask_at:
                found = self._find(where)
                if found and self.where.now is where and not self._closed.is_set():
                    self._end(where, found)
                ask_at = time.monotonic() + self.beats.interval / 2  # all others may be asking too
            looked = time.monotonic()

    def _set_timer(self, seconds: float) -> None:
        """Set the timer that needs no lock: here, not at each step, for it starts a thread, some 50 us.

        A process without a launcher may be one that somebody suspends by hand, and the timer would count that.
        """
        if "RANK" not in os.environ or self._debugged:
            return
        if self._dumps is None and self.where.now.phase != "start_up":  # by then the folder stays where it is
            with suppress(OSError, Unanswered):
                self._dumps = within(REACH, self._open_dumps)
        if not self._closed.is_set():
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._dumps or 2)

    def _open_dumps(self) -> IO[str]:
        """The file for this rank's stacks, before it is needed; close() takes away an empty one."""
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        file = self._stacks.open("a")
        _dump_on_request(file)
        return file

    def _find(self, where: Where) -> Judgement | None:
        """Why nothing goes on; None while somebody still has time, or another rank judges."""
        if self.ranks.size == 1:
            self._speaks = True
            return self._judgement(where, Finding(None, f"it is {place(self._main)}", []))
        try:
            return self._judge(where)
        except Exception:  # the store hangs or is gone: each node is on its own
            found = self._judgement(where, self._store_hangs())
            self._alone, self._speaks = True, self._first_left(found.finding)
            return found

    def _judge(self, where: Where) -> Judgement | None:
        beats = self.beats
        self._judges = within(REACH, beats.claim)
        # If the rank that is to judge has stopped since, each of the others does it.
        overdue = time.monotonic() - where.at > 2 * self.bound(where.phase) + MARGIN
        if not (self._judges or overdue):
            return within(REACH, beats.judgement)
        before = within(REACH, beats.read)
        time.sleep(beats.interval + LOOK)
        finding = judge(before, within(REACH, beats.read), time.time())
        if finding is None or self.where.now is not where:
            return None
        found = self._judgement(where, finding)
        within(REACH, lambda: beats.publish(found))
        self._speaks = True
        return found

    def _release(self) -> None:
        """Let another rank judge: this one went on while it did."""
        if self._judges:
            self._judges = False
            with suppress(RuntimeError):
                within(REACH, self.beats.release)

    def _store_hangs(self) -> Finding:
        """The store is beside the launcher, or in rank 0's process."""
        beside = (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "TRAINWRIGHT_RENDEZVOUS" in os.environ
        )
        if beside or self.ranks.first:
            return Finding(None, "the launcher's store doesn't answer", [])
        return Finding(0, "the store in its process doesn't answer", [0])

    def _judgement(self, where: Where, finding: Finding) -> Judgement:
        stuck = f"no progress for {time.monotonic() - where.at:.0f} s in step {where.step} ({where.phase})"
        who = "" if finding.straggler is None else f"rank {finding.straggler} straggles: "
        said = f"{stuck}; {who}{finding.why}; stacks are in {self._stacks.parent}"
        return Judgement(finding, said if self.ranks.size == 1 else f"{first_failure.who()}: {said}")

    def _node(self) -> list[int]:
        """The ranks that this one may signal, itself included."""
        own = self.peers[self.ranks.rank].launcher
        return [rank for rank, peer in enumerate(self.peers) if peer.launcher == own]

    def _first_left(self, finding: Finding) -> bool:
        """Whether this is the first rank of its launcher that hasn't stopped."""
        own = self.ranks.rank
        return own == min(rank for rank in self._node() if rank not in finding.stopped or rank == own)

    def _end(self, where: Where, found: Judgement) -> None:
        """Say what there is to know, end this launcher's stopped ranks, which can't do it, and this one.

        A stopped process doesn't act on a launcher's SIGTERM, and SIGKILL comes after all the time to save.
        """
        promise(MARGIN)
        others = set(self._node()) & set(found.finding.stopped) - {self.ranks.rank}
        stopped = [self.peers[rank].pid for rank in others]
        if self._first_left(found.finding):
            for pid in stopped:
                _signal(pid, getattr(signal, "SIGUSR2", signal.SIGTERM))
        for act in (self._say, self._write_event, self._write_stacks):
            with suppress(Exception):
                within(REACH, partial(act, where, found))
        time.sleep(PARTING)
        for pid in stopped:
            _signal(pid, signal.SIGKILL)
        os._exit(1)

    def _say(self, where: Where, found: Judgement) -> None:
        """On stderr, if this rank is the one that speaks, and for the launcher's summary."""
        failure = first_failure.Failure(1, found.line)
        if self._speaks:
            failure = first_failure.say(failure, alone=self._alone or self.ranks.size == 1)
        first_failure.for_torchrun(failure)
        leave(failure.status, failure.line)

    def _write_event(self, where: Where, found: Judgement) -> None:
        """Add to the run's events: by the rank that speaks, which needn't be the first."""
        if self._speaks:
            fields = {"rank": self.ranks.rank, "step": where.step, "phase": where.phase}
            fields |= {"straggler": found.finding.straggler, "reason": found.finding.why}
            EventsFile(self.folder).on_event("hang", {**fields, "stacks": str(self._stacks.parent)})

    def _write_stacks(self, where: Where, found: Judgement) -> None:
        waits, now = collective(self._main), datetime.now(UTC).isoformat(timespec="seconds")
        lines = [
            f"==== {now} rank {self.ranks.rank} on {node_name()}",
            f"in step {where.step} ({where.phase}) for {time.monotonic() - where.at:.1f} s; "
            f"the bound is {self.bound(where.phase):.1f} s",
            waits or f"in no collective, {place(self._main)}",
            f"found: {found.line}",
        ]
        self._stacks.parent.mkdir(parents=True, exist_ok=True)
        with self._stacks.open("a") as file:
            file.write("\n".join([*lines, "", all_stacks(self._main), ""]))
        self.platform.dump_collectives(self._stacks.with_suffix(".collectives"))


def _dump_on_request(file: IO[str] | int) -> None:
    """Another rank asks for this one's stacks before it ends it; it may be stuck with Python's lock."""
    if hasattr(faulthandler, "register"):
        faulthandler.register(signal.SIGUSR2, file=file)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
