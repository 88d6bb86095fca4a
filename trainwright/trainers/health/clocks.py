"""Whether the nodes' clocks agree, measured through the process group."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

from trainwright.trainers.parallel.ranks import Ranks

ROUNDS = 6

wall_clock = time.time


class Offset(NamedTuple):
    """How many seconds a clock is ahead of the first node's, give or take `error`."""

    seconds: float
    error: float


Stamps = Sequence[tuple[float, float]]


def stamp(ranks: Ranks) -> Stamps:
    """Read the rank's clock before and after each of some sums of all ranks."""
    stamps = []
    for _ in range(ROUNDS):
        before = wall_clock()
        ranks.sum(torch.zeros(1))
        stamps.append((before, wall_clock()))
    return stamps


def offsets(stamps: Mapping[str, Stamps]) -> dict[str, Offset]:
    """Each node's clock against the first one's, from the stamps of one rank of each.

    Nobody leaves a sum before all have entered it, so a node enters before the first one leaves, and leaves
    after it has entered. Each round bounds the offset from both sides; the narrowest bounds count.
    """
    first = next(iter(stamps.values()))
    found = {}
    for node, its in stamps.items():
        low = max(entered - left for (entered, _), (_, left) in zip(its, first, strict=True))
        high = min(left - entered for (_, left), (entered, _) in zip(its, first, strict=True))
        found[node] = Offset((low + high) / 2, max(0.0, (high - low) / 2))
    return found if len(found) > 1 else dict.fromkeys(found, Offset(0.0, 0.0))


def skew(of: Mapping[str, Offset]) -> float:
    """The largest difference between two clocks that is certain, in seconds."""
    lows, highs = ([o.seconds - sign * o.error for o in of.values()] for sign in (1, -1))
    return max(0.0, max(lows) - min(highs))


def astray(of: Mapping[str, Offset], limit: float) -> dict[str, float]:
    """The nodes whose clock has to go for the others to agree within `limit`, and how far each is off.

    Whoever is farthest from the median goes first; of two nodes both, for neither is known to be right.
    """
    left, off = dict(of), {}
    while len(left) > 1 and skew(left) > limit:
        middle = median(offset.seconds for offset in left.values())
        distances = {node: offset.seconds - middle for node, offset in left.items()}
        worst = max(map(abs, distances.values()))
        for node, distance in distances.items():
            if abs(distance) > worst * (1 - 1e-6):
                off[node] = distance
                del left[node]
    return off
