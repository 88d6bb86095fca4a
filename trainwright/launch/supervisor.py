"""Starts torchrun, watches it and its workers' verdicts, starts it again where that helps, ends them all."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from trainwright import verdict
from trainwright.errors import INTERRUPTED
from trainwright.launch.endings import FAILED, SAVED, Ending, Notice, Verdicts, how_it_ended
from trainwright.launch.hung import Hung
from trainwright.launch.last_words import LastWords
from trainwright.launch.processes import adopt_orphans, end_all_below, end_with_parent

POLL = 0.1  # seconds between two looks at torchrun and the verdicts
MARGIN = 15.0  # seconds that torchrun gets beyond those that it gives its workers
DRAIN = 2.0  # seconds to hand on what the last of them has said
AFTER_A_FINAL_VERDICT = 10.0  # seconds: nothing is left to save, and ranks that wait for others never notice
PROGRESS = 300.0  # seconds from a worker's first step to its last after which relaunches count as unused
PAUSES = (1.0, 5.0, 20.0, 60.0)  # seconds before the first relaunch, the second, ...; the last from then on

# What the supervisor is told to end by, and what it tells torchrun, which hands it on to the workers.
SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,  # Slurm's warning before the time is up
    signal.SIGINT: signal.SIGINT,
}


class Command(NamedTuple):
    """A program and its environment."""

    words: Sequence[str]
    environment: Mapping[str, str]


class _Asked:
    """The signals that told the supervisor to end, in order."""

    def __init__(self) -> None:
        self.by: list[Notice] = []

    def note(self, number: int, _frame: FrameType | None) -> None:
        self.by.append(Notice(signal.Signals(number), time.time()))

    @property
    def first(self) -> Notice | None:
        return self.by[0] if self.by else None

    @property
    def insists(self) -> bool:
        """Whether the keyboard has said so twice: end at once."""
        return [notice.signal for notice in self.by].count(signal.SIGINT) > 1


class Limits(NamedTuple):
    """How long what may go on.

    relaunches: how often torchrun is started again without having worked for a while between.
    shutdown: the seconds that it gives its workers to end in.
    patience: the seconds that it waits for other nodes; after as many without a worker it isn't started again.
    """

    relaunches: int
    shutdown: float
    patience: float


def supervise(
    torchrun: Callable[[], Command],
    ready: Callable[[], bool],
    limits: Limits,
    hear: Callable[[IO[bytes]], LastWords] | None = None,
) -> Ending:
    """Run torchrun until the run is done or can't go on here.

    torchrun: the command, made anew for each start. ready: whether it would find where nodes meet. hear: takes
    the workers' stderr, for what one says before it is killed; None leaves it what it is.
    """
    adopt_orphans()
    with _listening() as asked, tempfile.TemporaryDirectory(prefix="trainwright-") as folder:
        starts = used = 0
        ending: Ending | None = None
        while True:
            _wait(ready, limits.patience, asked)
            if asked.first:
                return _nothing_ran(asked.first.signal)
            starts += 1
            verdicts = Verdicts(Path(folder) / str(starts))
            verdicts.folder.mkdir()
            status = _run_once(torchrun(), verdicts, asked, limits.shutdown, hear)
            notice = asked.first  # one that comes from here on finds nothing running
            before, ending = ending, how_it_ended(status, verdicts, notice)
            if ending.status not in (FAILED, SAVED) or notice:
                return ending
            if before and not verdicts.last():  # what ended the last ranks says more than that no other started
                ending = before
            used = 0 if verdicts.worked() > PROGRESS else used
            if used == limits.relaunches or verdicts.idle() >= limits.patience:
                return ending
            pause = PAUSES[min(used, len(PAUSES) - 1)]
            used += 1
            _say(f"{ending.line}; torchrun starts again in {pause:g} s ({used} of {limits.relaunches})")
            _wait(lambda: False, pause, asked)


def _wait(true: Callable[[], bool], seconds: float, asked: _Asked) -> None:
    """Wait until it is true or somebody asks to end, but for no more than `seconds`."""
    until = time.monotonic() + seconds
    while not asked.by and not true() and time.monotonic() < until:
        time.sleep(POLL)


def _nothing_ran(asked: signal.Signals) -> Ending:
    status = INTERRUPTED if asked == signal.SIGINT else SAVED
    return Ending(status, f"{asked.name} before torchrun had started: run the same command again")


def _run_once(
    command: Command,
    verdicts: Verdicts,
    asked: _Asked,
    shutdown: float,
    hear: Callable[[IO[bytes]], LastWords] | None,
) -> int:
    """The exit status of one torchrun, from its start until nothing of it is left."""
    environment = {**command.environment, verdict.FOLDER: str(verdicts.folder)}
    process = subprocess.Popen(
        command.words,
        env=environment,
        start_new_session=True,
        preexec_fn=end_with_parent,
        stderr=subprocess.PIPE if hear else None,
    )
    words = None
    if hear and process.stderr:
        words = hear(process.stderr)
        verdicts.explain = words.explain
    hung, grace = Hung(verdicts.folder), 0.0
    try:
        while process.poll() is None and not asked.by and verdicts.final() is None:
            hung.look()
            time.sleep(POLL)
        if asked.first:
            grace = shutdown + MARGIN
            process.send_signal(SIGNALS[asked.first.signal])
        elif process.poll() is None:
            grace = AFTER_A_FINAL_VERDICT
            process.terminate()
        until = time.monotonic() + grace
        while process.poll() is None and time.monotonic() < until and not asked.insists:
            time.sleep(POLL)
        if process.poll() is None:
            process.kill()
        # Where torchrun itself was killed, its workers still train, and can save.
        crashed = process.wait() < 0 and not asked.by and verdicts.final() is None
        end_all_below(shutdown if crashed else 0.0)
        return process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        end_all_below(0.0)
        if words:
            words.wait(DRAIN)


@contextmanager
def _listening() -> Iterator[_Asked]:
    asked = _Asked()
    before = {number: signal.signal(number, asked.note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    sys.stderr.write(f"trainwright: {line}\n")
    sys.stderr.flush()
