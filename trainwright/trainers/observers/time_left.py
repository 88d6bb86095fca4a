"""How long a run still takes, from how long its last steps took."""

import time
from collections import deque

WINDOW = 50  # steps that the estimate looks back on


class TimeLeft:
    """The clock of a run; what happens between steps (validation, a checkpoint) counts as it recurs.

    The first step is left out of it: it compiles and warms up.
    """

    def __init__(self, total_steps: int | None) -> None:
        self.total_steps = total_steps
        self.marks: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)

    def after(self, step: int) -> float | None:
        """Seconds left once `step` has ended; None after the first step and where no end is known."""
        self.marks.append((step, time.monotonic()))
        (first, began), (_, now) = self.marks[0], self.marks[-1]
        if self.total_steps is None or step == first:
            return None
        return max(0, self.total_steps - step) * (now - began) / (step - first)


def duration(seconds: float) -> str:
    """`12s`, `4m10s`, `1h05m`, `2d03h`: the two largest units that count."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02d}m"
    return f"{hours // 24}d{hours % 24:02d}h"
