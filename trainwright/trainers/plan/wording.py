"""How a plan's numbers are written, on the console and on the page."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """`rows` under `head`, in columns."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        yield "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def gib(size: float) -> str:
    """`12.34 GiB`."""
    return f"{size / 2**30:.2f} GiB"


APART = 0.1  # of the memory by arithmetic: more than that is said


def differences(rehearsal: Mapping[str, Any]) -> Iterator[str]:
    """Where a rehearsal, as `rehearsal_verb.rehearsal_json` has it, isn't what the arithmetic says."""
    for one in rehearsal["ranks"]:
        if not one["as_by_arithmetic"]:
            yield f"rank {one['rank']} sends something else than arithmetic says: a bug"
        if abs(one["memory_ratio"] - 1) > APART:
            yield (
                f"rank {one['rank']} holds {one['memory_ratio']:.2f} times what arithmetic says, which is "
                f"{gib(one['memory']['total'] / one['memory_ratio'])}"
            )


def words(**pairs: object) -> str:
    """`key=value key=value`, for a log; a value with spaces in quotes."""
    return " ".join(f"{key}={_quoted(value)}" for key, value in pairs.items())


def _quoted(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if " " in text else text
