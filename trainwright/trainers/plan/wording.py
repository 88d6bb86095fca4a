"""How a plan's numbers are written, on the console and on the page."""

import math

from trainwright.trainers.observers.time_left import duration
from trainwright.trainers.plan.goodput_outlook import HOUR


def spoken(seconds: float) -> str:
    """`13 ms`, `2.5 s`, `4m10s`, `48.8 h`, `86d19h`; `never` for infinity."""
    if math.isinf(seconds):
        return "never"
    if seconds < 0.0995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    return f"{seconds / HOUR:.3g} h" if HOUR <= seconds < 100 * HOUR else duration(seconds)


def percent(share: float) -> str:
    """`98.81 %`."""
    return f"{100 * share:.2f} %"
