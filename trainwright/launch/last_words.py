"""What workers say on stderr before they die of it: a device's library may end a process and say only that."""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import IO

from trainwright.errors import TrainwrightError
from trainwright.trainers.platform.device_errors import Known, known_in

KEPT = 1 << 16  # bytes, at least
CHUNK = 1 << 13


class LastWords:
    """Hands on what comes from a pipe to this process's stderr, and keeps the end of it.

    failures: those that are looked for.
    """

    def __init__(self, pipe: IO[bytes], failures: Sequence[Known]) -> None:
        self.failures = failures
        self._kept: deque[tuple[float, bytes]] = deque()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._hand_on, args=(pipe,), daemon=True)
        self._thread.start()

    def _hand_on(self, pipe: IO[bytes]) -> None:
        with pipe:
            while chunk := os.read(pipe.fileno(), CHUNK):
                with self._lock:
                    self._kept.append((time.time(), chunk))
                    while sum(len(kept) for _, kept in self._kept) - len(self._kept[0][1]) > KEPT:
                        self._kept.popleft()
                while chunk:
                    chunk = chunk[os.write(2, chunk) :]

    def wait(self, seconds: float) -> None:
        """Until all that was said has been handed on: nobody may be left to say more."""
        self._thread.join(seconds)

    def explain(self, since: float) -> TrainwrightError | None:
        """The failure that was told of since that moment."""
        with self._lock:
            said = b"".join(chunk for at, chunk in self._kept if at >= since)
        text = said.decode(errors="replace")
        known = known_in(text, self.failures)
        return None if known is None else known.error(text)
