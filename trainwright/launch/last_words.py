"""What workers say on stderr before they die of it: a device's library may end a process and say only that."""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from trainwright.errors import NumericalFailure, RunFailed, TrainwrightError
from trainwright.trainers.platform.device_errors import Known, known_in, tells

KEPT = 1 << 17  # bytes of lines that may tell of a failure: a library may print megabytes beside them
CHUNK = 1 << 13
PATIENCE = 1.0  # seconds that our own stderr gets to take more


class LastWords:
    """Hands on what comes from a pipe to this process's stderr, and keeps what may tell of a failure.

    failures: those that are looked for. again: a NaN may be its batch's, which is left out once it has done it
    twice (`resilience.pass_over_batch`).
    """

    def __init__(self, pipe: IO[bytes], failures: Sequence[Known], again: bool) -> None:
        self.failures = failures
        self.again = again
        self._kept: deque[tuple[float, bytes]] = deque()
        self._size = 0
        self._rest = b""  # of a line that isn't whole yet
        self._telling = False  # the line before it does
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._hand_on, args=(pipe,), daemon=True)
        self._thread.start()

    def _hand_on(self, pipe: IO[bytes]) -> None:
        with pipe:
            while chunk := os.read(pipe.fileno(), CHUNK):
                with self._lock:
                    self._keep(chunk)
                _show(chunk)

    def _keep(self, chunk: bytes) -> None:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > CHUNK:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            before, self._telling = self._telling, tells(line.decode(errors="replace"))
            if self._telling or before:  # a sentence may go on in the next line
                self._kept.append((time.time(), line))
                self._size += len(line)
        while self._size > KEPT:
            self._size -= len(self._kept.popleft()[1])

    def wait(self, seconds: float) -> None:
        """Until all that was said has been handed on: nobody may be left to say more."""
        self._thread.join(seconds)

    def explain(self, since: float, worked: bool) -> TrainwrightError | None:
        """The failure that was told of since that moment. worked: by a worker that had made a step."""
        with self._lock:
            said = b"\n".join([*(line for at, line in self._kept if at >= since), self._rest])
        text = said.decode(errors="replace")
        known = known_in(text, self.failures)
        if known is None:
            return None
        error = known.error(text, worked)
        if self.again and isinstance(error, NumericalFailure):
            return RunFailed(f"{error}; or start again to see whether it is the batch")
        return error


def _show(said: bytes) -> None:
    """Write it to stderr. Where that can't be, it is lost: workers that nobody reads from would stop."""
    with suppress(OSError):
        while said:
            try:
                said = said[os.write(2, said) :]
            except BlockingIOError:
                if not select.select([], [2], [], PATIENCE)[1]:
                    return
