"""How much of a long run's time trains the model, and how far apart its saves should be: the formulas.

A run works for `interval` seconds, is held for `stall` while its state is copied, and goes on while the copy is
written for `save` seconds more. Failures come at any time with rate 1/MTBF (a Poisson process). After one the
run is down for `restart` seconds (seen, processes started, state loaded), which a further failure begins anew,
and it goes on from the newest save that was whole: one still being written is lost.

Between two failures lie X seconds, exponential with rate L = 1/MTBF. The first `restart` of them are lost,
and the k-th save after that is whole at `k * (interval + stall) + save`. So the work kept of X is `interval`
times the number of saves that became whole, and in the long run

    utilisation = E[work kept] / E[X] = L * interval * sum over k >= 1 of P(X > restart + k * period + save)
                = L * interval * E[exp(-L * restart)] * exp(-L * save) / (exp(L * period) - 1),

with period = interval + stall. With a fixed restart and no `save` (a synchronous save is all stall) that is
Daly's complete cost function (J. T. Daly, A higher order estimate of the optimum checkpoint interval for
restart dumps, Future Generation Computer Systems 22, 2006); an asynchronous save adds its writing to the
restart. Neither moves the best interval, which is where (exp(L * period) - 1) / interval is least.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Restart:
    """One kind of failure: which share of all it is, and how long the run is down after it."""

    share: float
    seconds: float
    name: str = ""


@dataclass(frozen=True)
class Costs:
    """What keeping a run alive costs on its cluster, in seconds."""

    stall: float  # the loop is held by a save, or the steps beside it take longer
    save: float  # a save is written beside the training
    restarts: tuple[Restart, ...]  # shares add up to 1
    mtbf: float  # mean time between failures of the whole cluster; inf: none

    @property
    def mean_restart(self) -> float:
        return sum(kind.share * kind.seconds for kind in self.restarts)


def best_interval(stall_s: float, save_s: float, mtbf_s: float) -> float:
    """Seconds between saves that lose the least time: the exact optimum, and at least `save_s`.

    Two saves never overlap, so the next one waits for the end of the one before. Infinite where nothing fails.

    stall_s: that a save holds the loop. save_s: that it is written beside the training. mtbf_s: mean time
    between failures of the whole run.
    """
    if math.isinf(mtbf_s):
        return math.inf
    return max(mtbf_s * _best_share(stall_s / mtbf_s), save_s)


def _best_share(stall: float) -> float:
    """The best interval as a share of the MTBF, for a stall that is a share of it too.

    Where the derivative of (exp(x + stall) - 1) / x is zero, (1 - x) exp(x + stall) = 1; its logarithm
    falls all the way from x = 0 to 1, so halving finds its only root.
    """
    if stall < 1e-10:  # the logarithm's digits would run out; Young's is exact to 1e-5 here
        return math.sqrt(2 * stall)
    low, high = 0.0, 1.0
    while (x := (low + high) / 2) not in (low, high):
        if math.log1p(-x) + x + stall > 0:
            low = x
        else:
            high = x
    return x


def young_interval(stall_s: float, mtbf_s: float) -> float:
    """The optimum to first order (J. W. Young, Communications of the ACM 17, 1974)."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_interval(stall_s: float, mtbf_s: float) -> float:
    """Daly's higher-order estimate of the optimum (2006)."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    root = math.sqrt(stall_s / (2 * mtbf_s))
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + root / 3 + root * root / 9) - stall_s


def utilisation(costs: Costs, interval: float) -> float:
    """The share of a long run's time that is work which no failure undoes.

    interval: seconds of work between saves, at least `costs.save`.
    """
    if math.isinf(costs.mtbf):
        return 1.0 if math.isinf(interval) else interval / (interval + costs.stall)
    rate = 1 / costs.mtbf
    survived = sum(kind.share * math.exp(-rate * kind.seconds) for kind in costs.restarts)
    period = rate * (interval + costs.stall)
    if math.isinf(interval) or period > 700:  # beyond what exp can say
        return 0.0
    return rate * interval * survived * math.exp(-rate * costs.save) / math.expm1(period)


def first_order_losses(costs: Costs, interval: float) -> dict[str, float]:
    """Where the time goes, as shares, to first order in 1/MTBF: what each part costs on its own."""
    rate = 1 / costs.mtbf
    return {
        "held by saves": costs.stall / (interval + costs.stall),
        "work done again": rate * (interval / 2 + costs.save) if rate else 0.0,
        "down": rate * costs.mean_restart,
    }


def mtbf_seconds(nodes: int, failures_per_node_hour: float) -> float:
    """The mean time between failures of `nodes` machines that fail on their own."""
    rate = nodes * failures_per_node_hour / 3600
    return 1 / rate if rate else math.inf
