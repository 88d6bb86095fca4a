"""Runs that fail by chance, one failure after another: how far they differ from the formula's average."""

import math
from random import Random

from trainwright.trainers.plan.goodput import Costs


def simulate(costs: Costs, interval: float, seconds: float, runs: int, seed: int = 0) -> list[float]:
    """The utilisation of each of `runs` runs of so many seconds, lowest first.

    interval: seconds of work between saves. What is trained when a run ends counts, saved or not.
    """
    random = Random(seed)
    return sorted(_kept(costs, interval, seconds, random) / seconds for _ in range(runs))


def _kept(costs: Costs, interval: float, seconds: float, random: Random) -> float:
    """Seconds of work that one run keeps."""
    kept, period = 0.0, interval + costs.stall
    failure = _next(costs, random)
    up = 0.0  # since when the run has been training, from a whole save
    while failure < seconds:
        kept += interval * max(0, math.floor((failure - up - costs.save) / period))
        up = failure + _restart(costs, random)
        failure += _next(costs, random)
        while failure < min(up, seconds):  # down again before it was up
            up = failure + _restart(costs, random)
            failure += _next(costs, random)
    periods, rest = divmod(max(0.0, seconds - up), period)
    return kept + interval * periods + min(rest, interval)


def _next(costs: Costs, random: Random) -> float:
    return math.inf if math.isinf(costs.mtbf) else random.expovariate(1 / costs.mtbf)


def _restart(costs: Costs, random: Random) -> float:
    drawn = random.random()
    for kind in costs.restarts:
        drawn -= kind.share
        if drawn < 0:
            return kind.seconds
    return costs.restarts[-1].seconds
