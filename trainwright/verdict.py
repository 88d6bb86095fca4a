"""How a worker ended, for the supervisor that started it: launchers keep the exit statuses to themselves.

The supervisor names a folder. Each worker leaves a file there when it starts and puts its exit status and one
line into it when it ends; where no status stands, the worker was killed.
"""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from trainwright.errors import Preempted

FOLDER = "TRAINWRIGHT_VERDICTS"  # the variable that names the folder
STARTED = time.time()


def begin() -> None:
    """Leave word that this worker has started, and until training listens itself, of a SIGTERM."""
    if FOLDER in os.environ:
        signal.signal(signal.SIGTERM, _told_to_end)
        _write(None, "")


def _told_to_end(number: int, frame: FrameType | None) -> None:
    leave(Preempted.status, "SIGTERM came before the first step: run the same command to start again")
    os._exit(Preempted.status)  # an exception could end in any module that is being imported


def leave(status: int, line: str = "") -> None:
    """Leave this worker's exit status and, of a failure, why."""
    _write(status, line)


def _write(status: int | None, line: str) -> None:
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    rank, local_rank, pid = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0"), os.getpid()
    said = {
        "rank": int(rank),
        "local_rank": int(local_rank),
        "started": STARTED,
        "status": status,
        "line": line,
    }
    path = Path(folder) / f"{local_rank}-{pid}.json"
    with suppress(OSError):  # the supervisor is gone, or its disk is full: the run's own end counts
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(said))
        draft.rename(path)  # in one piece: the supervisor reads at any moment
