"""Ends workers that have stopped answering: a stopped process doesn't act on SIGTERM, nor judge itself.

torchrun does so too, but only once it wants to end the worker, and 30 s later.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from trainwright.launch.processes import there
from trainwright.verdict import DEADLINE

# Counted in looks, not seconds: a machine that was asleep goes on, and its workers promise again at once.
LOOKS = 50
LOOKS_FOR_STACKS = 20  # more, in which a worker that can writes its stacks


class Hung:
    """Looks after the workers whose verdicts are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._late: dict[Path, int] = {}  # the looks that found the worker's deadline passed

    def look(self) -> None:
        """End those that have been late for long; to be called about ten times a second."""
        for path in self.folder.glob(f"*{DEADLINE}"):
            with suppress(OSError):  # it has just ended
                self._look_at(path)

    def _look_at(self, path: Path) -> None:
        pid = int(path.stem.partition("-")[2])
        if not there(pid):
            path.unlink()
        elif time.monotonic() < path.stat().st_mtime:
            self._late.pop(path, None)
        else:
            self._late[path] = late = self._late.get(path, 0) + 1
            if late == LOOKS:
                os.kill(pid, signal.SIGUSR2)
            elif late >= LOOKS + LOOKS_FOR_STACKS:
                os.kill(pid, signal.SIGKILL)
                with suppress(OSError, ValueError, KeyError):  # a full disk, a torn verdict
                    _say_why(path.with_suffix(".json"))
                path.unlink()


def _say_why(path: Path) -> None:
    """On stderr, and in the worker's verdict."""
    said = json.loads(path.read_text())
    line = f"rank {said['rank']} and its watchdog stopped answering, and it was killed"
    sys.stderr.write(f"trainwright: {line}\n")
    sys.stderr.flush()
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({**said, "line": line}))
    draft.rename(path)
