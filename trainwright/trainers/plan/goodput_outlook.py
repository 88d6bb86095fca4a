"""What a cluster's parts and failures come to: the best interval, the utilisation, and how they vary."""

import math
from dataclasses import dataclass, replace
from statistics import mean

from trainwright.configs.schema import Recipe
from trainwright.trainers.plan.goodput import (
    Costs,
    best_interval,
    first_order_losses,
    mtbf_seconds,
    utilisation,
)
from trainwright.trainers.plan.goodput_parts import Cluster, Part, cluster, costs, parts, read_measured
from trainwright.trainers.plan.goodput_simulation import simulate

HOUR, DAY = 3600.0, 86400.0
# Effective utilisation in percent of 128 trn1.32xlarge, as AWS published it.
AUTOMATIC, BY_HAND = 98.81, 77.83
# Of one node in an hour. Llama 3: arXiv 2407.21783; Meta's research clusters: arXiv 2410.21680.
RATES = {"1.6e-4, as Llama 3's cluster": 1.6e-4, "1e-3, as Meta's research clusters": 1e-3}
GOAL = 0.995
FAILURES = 1_000_000  # that are simulated in all: a few seconds
POINTS = 60  # of the curve over intervals


@dataclass(frozen=True)
class Outlook:
    """A cluster with its failures, saved at the best interval. steps: that interval, in whole steps."""

    costs: Costs
    interval: float
    steps: int | None
    utilisation: float

    def room(self, share: float) -> float:
        """How many seconds longer every restart could take before the utilisation falls to `share`; exact."""
        return self.costs.mtbf * math.log(self.utilisation / share) if self.utilisation else -math.inf

    @property
    def losses(self) -> dict[str, float]:
        return first_order_losses(self.costs, self.interval)


@dataclass(frozen=True)
class Plan:
    """All that is shown."""

    on: Cluster
    parts: dict[str, Part]
    outlook: Outlook
    days: float
    runs: list[float]  # the utilisation of each simulated run, lowest first
    by_interval: list[tuple[float, float, float | None]]  # seconds; by formula; simulated, at some
    by_mtbf: list[Outlook]
    by_rate: dict[str, Outlook]
    recipe_interval: tuple[int, float] | None  # checkpoint.every and the utilisation at it

    @property
    def mean(self) -> float:
        return mean(self.runs)


def plan(recipe: Recipe) -> Plan:
    """The plan of `recipe`.

    Raises:
        BadRequest: a part is neither given nor measured.
    """
    on = cluster(recipe)
    found = parts(recipe.plan, read_measured(recipe.plan), on)
    step = found["step"].seconds
    on_it = costs(recipe, found, on)
    best = outlook(on_it, step)
    runs = recipe.plan.runs
    # Where something fails all the time, a shorter run says the same.
    seconds = min(recipe.plan.days * DAY, FAILURES / runs * on_it.mtbf)
    interval = best.interval if not math.isinf(best.interval) else seconds
    rates = {**RATES, f"{on.failures_per_node_hour:g}, as the recipe says": on.failures_per_node_hour}
    if on.failures_per_node_hour in RATES.values():
        rates = RATES
    every = recipe.checkpoint.every
    at_every = None
    if isinstance(every, int):
        at_every = every, utilisation(on_it, max(every * step, on_it.save))
    return Plan(
        on=on,
        parts=found,
        outlook=best,
        days=seconds / DAY,
        runs=simulate(on_it, interval, seconds, runs, recipe.seed),
        by_interval=_by_interval(on_it, best.interval, seconds, max(1, runs // 10), recipe.seed),
        by_mtbf=[outlook(replace(on_it, mtbf=hours * HOUR), step) for hours in range(1, 101)],
        by_rate={name: outlook(_with_rate(on_it, on, rate), step) for name, rate in rates.items()},
        recipe_interval=at_every,
    )


def outlook(on_it: Costs, step: float) -> Outlook:
    """The best interval that is whole steps, and what it comes to."""
    best = best_interval(on_it.stall, on_it.save, on_it.mtbf)
    if math.isinf(best):
        return Outlook(on_it, best, None, utilisation(on_it, best))
    steps = max(1, math.ceil(on_it.save / step), round(best / step))
    return Outlook(on_it, steps * step, steps, utilisation(on_it, steps * step))


def _with_rate(on_it: Costs, on: Cluster, rate: float) -> Costs:
    return replace(on_it, mtbf=mtbf_seconds(on.nodes, rate))


def _by_interval(
    on_it: Costs, best: float, seconds: float, runs: int, seed: int
) -> list[tuple[float, float, float | None]]:
    """The curve around the best interval; every fifth point is simulated too."""
    if math.isinf(best):
        return []
    low, high = max(best / 5, on_it.save, 1e-6), best * 5
    points = [low + (high - low) * (i / (POINTS - 1)) ** 2 for i in range(POINTS)]
    return [
        (at, utilisation(on_it, at), mean(simulate(on_it, at, seconds, runs, seed)) if i % 5 == 0 else None)
        for i, at in enumerate(points)
    ]
