"""How a worker ended, for the supervisor that started it: launchers keep the exit statuses to themselves.

The supervisor names a folder. Each worker leaves a file there when it starts and puts its exit status and one
line into it when it ends; where no status stands, the worker was killed. A second file's time is the deadline
by which the worker will have moved it on.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from trainwright.errors import Preempted

FOLDER = "TRAINWRIGHT_VERDICTS"  # the variable that names the folder, one below that of the whole launch
OPENED = "opened"  # in the launch's folder
DEADLINE = ".deadline"  # the suffix of the file whose time is a worker's deadline
STARTED = time.time()
NEWS = 60.0  # seconds between two notes of how long a worker has worked

_first_step: float | None = None
_noted = 0.0


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within the body, until something else listens, SIGTERM and SIGUSR1 end the process as preempted."""
    before = {}
    with suppress(ValueError):  # Python gives signals to its main thread only, and this is another
        for number in (signal.SIGTERM, signal.SIGUSR1):
            before[number] = signal.signal(number, _told_to_end)
    try:
        yield
    finally:
        for number, earlier in before.items():
            if signal.getsignal(number) is _told_to_end:  # a rank that fails ignores what its launcher sends
                signal.signal(number, earlier)


def _told_to_end(number: int, _frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    line = f"{name} came before the first step: run the same command to start again"
    leave(Preempted.status, line)
    if FOLDER not in os.environ and os.environ.get("RANK", "0") == "0":
        os.write(2, f"trainwright: {line}\n".encode())  # print isn't for handlers
    os._exit(Preempted.status)  # an exception could end in any module that is being imported


def begin() -> None:
    """Leave word that this worker has started."""
    _write(None, "")


def worked() -> None:
    """Leave word that this worker has come to a step; cheap enough for each."""
    global _first_step, _noted
    now = time.monotonic()
    if _first_step is not None and now - _noted < NEWS:
        return
    if _first_step is None:
        _first_step = now
        note_opened()
    _noted = now
    _write(None, "")


def has_worked() -> bool:
    """Whether this worker has made a step."""
    return _first_step is not None


def leave(status: int, line: str = "") -> None:
    """Leave this worker's exit status and, of a failure, why."""
    _write(status, line)


def promise(seconds: float) -> None:
    """Leave word that this worker promises again, or ends, within so many seconds; else it hangs."""
    path = _path(DEADLINE)
    if path is None:
        return
    with suppress(OSError):
        path.touch()
        # A file's time can be set on a full disk too. The monotonic clock is the same for all processes.
        os.utime(path, (0, time.monotonic() + seconds))


def promise_no_more() -> None:
    """Take the promise back."""
    if path := _path(DEADLINE):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def opened() -> bool:
    """Whether this node's part of the launch, of whose processes this is one, has opened the run's folder."""
    return FOLDER in os.environ and (Path(os.environ[FOLDER]).parent / OPENED).exists()


def note_opened() -> None:
    """Leave word, for all further starts of this launch, that what an earlier run left has been dealt with."""
    if FOLDER in os.environ:
        with suppress(OSError):
            (Path(os.environ[FOLDER]).parent / OPENED).touch()


def _path(suffix: str) -> Path | None:
    """Where this worker's file of that kind is; None without a supervisor."""
    folder = os.environ.get(FOLDER)
    return Path(folder) / f"{os.environ.get('LOCAL_RANK', '0')}-{os.getpid()}{suffix}" if folder else None


def _write(status: int | None, line: str) -> None:
    path = _path(".json")
    if path is None:
        return
    said = {
        "rank": int(os.environ.get("RANK", "0")),
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "started": STARTED,
        "worked": None if _first_step is None else _noted - _first_step,
        "status": status,
        "line": line,
    }
    with suppress(OSError):  # the supervisor is gone, or its disk is full: the run's own end counts
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(said))
        draft.rename(path)  # in one piece: the supervisor reads at any moment
