"""Where a rank's main thread is: what the watchdog and the pace go by."""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

STEP = ("forward_backward", "data", "agree", "update")
PHASES = ("start_up", *STEP, "validation", "observers", "save")  # in the order in which a step has them
REMEMBERED = 50  # step times


class Where(NamedTuple):
    """In `phase` of `step`, since `at` in seconds of the monotonic clock."""

    phase: str
    step: int
    at: float


class Whereabouts:
    """The loop says `at(phase, step)` as it goes on, which takes about a microsecond; any thread may read.

    clock: tells the seconds in which the thread has worked. now: where it is. took, worked: of each phase, the
    last time that it was gone through, its seconds and those by the clock. steps: seconds of the last steps,
    without validation and observers; it is empty until the second step of the process.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.now = Where("start_up", 0, time.monotonic())
        self.took = dict.fromkeys(PHASES, 0.0)
        self.worked = dict.fromkeys(PHASES, 0.0)
        self.steps: deque[float] = deque(maxlen=REMEMBERED)
        self.has_clock = clock is not None
        self._clock = clock or time.monotonic
        self._worked_at = self._clock()
        self._stepped = False

    def begin_again(self) -> None:
        """The run begins again in this process: what comes now may take as long as a start."""
        self._stepped = False
        self.steps.clear()
        self.at("start_up", 0)

    def at(self, phase: str, step: int) -> None:
        """The main thread comes to `phase` of `step`."""
        before, now, worked = self.now, time.monotonic(), self._clock()
        self.took[before.phase] = now - before.at
        self.worked[before.phase] = worked - self._worked_at
        self._worked_at = worked
        self.now = Where(phase, step, now)
        if phase == "forward_backward":
            if self._stepped:
                took = self.took
                self.steps.append(took["forward_backward"] + took["data"] + took["agree"] + took["update"])
            self._stepped = True
