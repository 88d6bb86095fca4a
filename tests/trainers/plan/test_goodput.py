import math
from dataclasses import replace
from random import Random
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.trainers.plan.goodput import (
    Costs,
    Restart,
    best_interval,
    daly_interval,
    first_order_losses,
    mtbf_seconds,
    utilisation,
    young_interval,
)
from trainwright.trainers.plan.goodput_simulation import simulate

HOUR = 3600.0
COSTS = Costs(stall=2, save=30, restarts=(Restart(0.5, 90), Restart(0.5, 400)), mtbf=8 * HOUR)
HARD = Costs(stall=20, save=100, restarts=(Restart(0.7, 60), Restart(0.3, 900)), mtbf=1500)

stalls = st.floats(1e-3, 1e3)
mtbfs = st.floats(1e2, 1e8)


def walk(costs, interval, failures, random):
    """The same process, second by second in its phases: a check of both the formula and the simulation."""
    now = kept = 0.0
    failure = random.expovariate(1 / costs.mtbf)
    for _ in range(failures):
        whole, begun = 0.0, []  # work in whole saves; when those in writing will be whole
        clock, work = now, 0.0
        while clock < failure:
            work += interval
            clock += interval + costs.stall
            begun.append((clock + costs.save, work))
        whole = max((w for done, w in begun if done <= failure), default=0.0)
        kept += whole
        now = failure
        failure = now + random.expovariate(1 / costs.mtbf)
        while True:
            drawn, down = random.random(), costs.restarts[-1].seconds
            for kind in costs.restarts:
                if drawn < kind.share:
                    down = kind.seconds
                    break
                drawn -= kind.share
            if now + down <= failure:
                break
            now = failure
            failure = now + random.expovariate(1 / costs.mtbf)
        now += down
    return kept / now


@pytest.mark.parametrize(("costs", "interval"), [(COSTS, 400), (COSTS, 60), (HARD, 200), (HARD, 900)])
def test_the_formula_is_what_happens(costs, interval):
    seen = [walk(costs, interval, 400, Random(seed)) for seed in range(60)]
    error = stdev(seen) / math.sqrt(len(seen))
    assert abs(mean(seen) - utilisation(costs, interval)) < 4 * error


@pytest.mark.parametrize(("costs", "interval"), [(COSTS, 400), (COSTS, 60), (HARD, 200), (HARD, 900)])
def test_the_simulation_agrees_with_the_formula(costs, interval):
    seconds = 2000 * costs.mtbf
    seen = simulate(costs, interval, seconds, 200)
    error = stdev(seen) / math.sqrt(len(seen))
    ends = (interval + costs.save + costs.mean_restart) / seconds  # what a run's first and last work add
    assert abs(mean(seen) - utilisation(costs, interval)) < 4 * error + ends
    assert seen == sorted(seen)


def test_a_run_that_nothing_breaks_only_stalls():
    costs = replace(COSTS, mtbf=math.inf)
    assert utilisation(costs, 100) == 100 / 102
    assert simulate(costs, 100, 1020, 2) == [pytest.approx(100 / 102)] * 2
    assert best_interval(2, 30, math.inf) == math.inf
    assert utilisation(costs, math.inf) == 1


def test_known_values():
    assert young_interval(2, 176400) == 840
    assert best_interval(2, 30, 176400) == pytest.approx(daly_interval(2, 176400), rel=1e-6)
    assert mtbf_seconds(128, 1.6e-4) / HOUR == pytest.approx(48.83, abs=0.01)
    assert mtbf_seconds(128, 0) == math.inf
    # A synchronous save and one kind of restart: Daly's complete cost function.
    costs = Costs(stall=60, save=0, restarts=(Restart(1.0, 300),), mtbf=8 * HOUR)
    share = 1000 / (8 * HOUR * math.exp(300 / (8 * HOUR)) * math.expm1(1060 / (8 * HOUR)))
    assert utilisation(costs, 1000) == pytest.approx(share)


def test_the_losses_add_up_to_the_formula_where_failures_are_rare():
    costs = replace(COSTS, mtbf=3000 * HOUR)
    losses = first_order_losses(costs, 5000)
    assert 1 - sum(losses.values()) == pytest.approx(utilisation(costs, 5000), abs=1e-5)


@given(stalls, mtbfs)
def test_the_best_interval_is_a_minimum(stall, mtbf):
    best = best_interval(stall, 0, mtbf)
    costs = Costs(stall, 0, (Restart(1.0, 60),), mtbf)
    at_best = utilisation(costs, best)
    for factor in (0.5, 0.8, 0.98, 1.02, 1.25, 2):
        assert utilisation(costs, best * factor) <= at_best * (1 + 1e-12)
    assert 0 < best < mtbf


@given(stalls, st.floats(0, 1e4), mtbfs)
def test_saves_never_overlap_and_rarer_failures_ask_for_fewer(stall, save, mtbf):
    best = best_interval(stall, save, mtbf)
    assert best >= save
    assert best_interval(stall, save, 2 * mtbf) >= best
    assert best_interval(2 * stall, save, mtbf) >= best


@given(stalls, mtbfs, st.floats(1, 1e4))
def test_more_failures_never_help(stall, mtbf, interval):
    costs = Costs(stall, 10, (Restart(1.0, 60),), mtbf)
    assert utilisation(replace(costs, mtbf=mtbf / 2), interval) <= utilisation(costs, interval)
    assert 0 <= utilisation(costs, interval) <= 1


def test_extremes_are_numbers():
    assert best_interval(0, 0, 1e5) == 0
    assert best_interval(0, 7, 1e5) == 7
    assert best_interval(1e-9, 0, 1e7) == pytest.approx(young_interval(1e-9, 1e7))
    assert best_interval(1e6, 0, 10) == pytest.approx(10)
    assert utilisation(replace(COSTS, mtbf=1), 1e5) == 0
