from pathlib import Path

import numpy as np
import pytest

from tests.ranks import RankPool
from trainwright.configs.schema import ParallelConfig, Recipe
from trainwright.trainers.observers.base import Progress, Run
from trainwright.trainers.parallel.ranks import Ranks, open_ranks
from trainwright.trainers.platform.choose import choose_platform
from trainwright.trainers.resilience import pace
from trainwright.trainers.resilience.pace import Pace
from trainwright.trainers.resilience.whereabouts import Whereabouts

EVERY = 4


def went_through(where: Whereabouts, worked: float, waited: float, data: float = 0.0) -> None:
    """A step in which the rank worked and waited so long."""
    where.took = {"forward_backward": worked + waited, "data": data, "agree": waited, "update": 0.0}
    where.worked = {"forward_backward": worked, "data": 0.0, "agree": 0.0, "update": 0.0}


def paced(seconds: list[float], steps: int) -> list[tuple[str, dict]]:
    """On every rank: the events of some steps that take each its own seconds of work, and all as long."""
    events: list[tuple[str, dict]] = []
    before, pace.EVERY = pace.EVERY, EVERY
    with open_ranks(ParallelConfig(), choose_platform("cpu")) as ranks:
        where = Whereabouts(float)
        observer = Pace(where, ranks)
        observer.on_start(run(ranks.size, events), progress(0))
        own = seconds[ranks.rank]
        for step in range(1, steps + 1):
            # Every third step is odd, as one with a page fault; the median passes it over.
            went_through(where, own * (10 if step % 3 == 0 else 1), max(seconds) - own)
            observer.on_step(progress(step), {})
    pace.EVERY = before
    return events


def run(ranks: int, events: list[tuple[str, dict]]) -> Run:
    return Run(Recipe(), Path(), 100, 1, ranks, lambda event, **fields: events.append((event, fields)))


def progress(step: int) -> Progress:
    return Progress(step, 0, np.zeros((1, 1), np.int64))


def test_the_slow_rank_is_named_by_rank_0(run_on_ranks: RankPool):
    events, *others = run_on_ranks(paced, 3, [1.0, 1.1, 1.5], 2 * EVERY + 1)
    assert others == [[], []]
    assert [name for name, _ in events] == ["ranks", "slow_rank"] * 2
    (_, ranks), (_, slow) = events[:2]
    assert (ranks["step"], ranks["min_s"], ranks["median_s"], ranks["max_s"]) == (EVERY, 1.0, 1.1, 1.5)
    assert (ranks["slowest"], slow["rank"], slow["work_s"], slow["median_s"]) == (2, 2, 1.5, 1.1)
    assert slow["host"] == ranks["host"] != ""


def test_ranks_that_keep_step_are_not(run_on_ranks: RankPool):
    events, *_ = run_on_ranks(paced, 3, [1.0, 1.1, 1.3], EVERY)
    assert [name for name, _ in events] == ["ranks"]


@pytest.mark.parametrize(
    ("clock", "tp_rank", "work"),
    [
        (float, 0, 2.0 + 0.5),  # by the clock, and its own data
        (float, 1, 2.0),  # whose data is another's
        (None, 0, 2.0 + 0.5),  # without a clock: all but the all-reduce
        (None, 1, 2.0),
    ],
)
def test_what_counts_as_work(clock, tp_rank: int, work: float):
    where = Whereabouts(clock)
    went_through(where, worked=2.0, waited=7.0, data=0.5)
    if clock is None:
        where.worked = {**where.took, "forward_backward": 2.0}
    assert Pace(where, Ranks(tp_rank=tp_rank)).work() == work


def test_a_rank_on_its_own_says_nothing():
    events: list[tuple[str, dict]] = []
    observer = Pace(Whereabouts(), Ranks())
    observer.on_start(run(1, events), progress(0))
    for step in range(1, 101):
        observer.on_step(progress(step), {})
    assert events == []
