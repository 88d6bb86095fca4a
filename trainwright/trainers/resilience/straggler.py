"""Which of the ranks that make no progress the others wait for."""

from collections.abc import Sequence
from typing import NamedTuple

from trainwright.trainers.resilience.whereabouts import PHASES


class Beat(NamedTuple):
    """What a rank's watchdog says of its main thread every few seconds.

    number: which beat it is. wall: the time of day in seconds. waits: whether it is in a collective.
    place: in which, and at what line of code. left: seconds to the end of its bound.
    """

    number: int
    wall: float
    step: int
    phase: str
    waits: bool
    place: str
    left: float

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank has come."""
        return self.step, PHASES.index(self.phase)


class Finding(NamedTuple):
    """Why nothing goes on.

    straggler: the rank that all wait for; None if none stands out. stopped: those whose beats have stopped.
    """

    straggler: int | None
    why: str
    stopped: list[int]


def judge(before: Sequence[Beat | None], after: Sequence[Beat | None], now: float) -> Finding | None:
    """Whom the ranks wait for, from two readings of all beats that lie more than one beat apart.

    None: the rank that the others wait for still has time by its own bound. now: the time of day.
    """
    alive = {
        rank: new
        for rank, (old, new) in enumerate(zip(before, after, strict=True))
        if new and (old is None or new.number > old.number)
    }
    stopped = [rank for rank in range(len(after)) if rank not in alive]
    if stopped:
        straggler = min(stopped, key=lambda rank: beat.progress if (beat := after[rank]) else (-1, 0))
        last = after[straggler]
        why = f"its beats stopped {now - last.wall:.0f} s ago" if last else "it has sent no beat"
        if last:
            why += f", last seen in step {last.step} ({last.phase})"
        more = f"; {len(stopped) - 1} more have stopped" if len(stopped) > 1 else ""
        return Finding(straggler, why + more, stopped)
    if len({(beat.progress, beat.waits, beat.place) for beat in alive.values()}) == 1:
        (where,) = {beat.place for beat in alive.values()}
        return (
            Finding(None, f"all ranks are in the same place, {where}", [])
            if any(b.left <= 0 for b in alive.values())
            else None
        )
    working = [rank for rank, beat in alive.items() if not beat.waits]
    straggler = min(working or alive, key=lambda rank: alive[rank].progress)
    beat = alive[straggler]
    if beat.left > 0:
        return None
    if working:
        why = f"it is in no collective, but in step {beat.step} ({beat.phase}) {beat.place}"
        return Finding(straggler, why, [])
    if beat.progress < max(other.progress for other in alive.values()):
        why = f"it is the furthest behind, in step {beat.step} ({beat.phase}), {beat.place}"
        return Finding(straggler, why, [])
    return Finding(None, f"no rank is behind: {_places(alive)}", [])


def _places(alive: dict[int, Beat]) -> str:
    """Each collective that ranks wait in, with one rank that does."""
    first: dict[str, int] = {}
    for rank, beat in alive.items():
        first.setdefault(beat.place, rank)
    return "; ".join(f"rank {rank} is {place}" for place, rank in first.items())
