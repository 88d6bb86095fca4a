"""Names ranks that work slower than the others, before they stop: all wait for the slowest in every step."""

import statistics

import torch

from trainwright.trainers.node import node_name
from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.parallel.ranks import HOST, Ranks
from trainwright.trainers.resilience.whereabouts import Whereabouts

EVERY = 50  # steps
NAMED = 8  # of the slow ranks, the slowest first


class Pace(Observer):
    """Every rank has one. Every `EVERY` steps rank 0 says how long the ranks have worked, and which were slow.

    A rank's work is what it did itself in a step, not what it waited for: by the platform's clock of work where
    there is one, else all of the step but the agreeing all-reduce. Its wait for its own data counts as work.
    """

    def __init__(self, where: Whereabouts, ranks: Ranks) -> None:
        self.where, self.ranks = where, ranks
        self._work: list[float] = []

    def on_start(self, run: Run, progress: Progress) -> None:
        self._run = run
        self._factor = run.recipe.resilience.slow_factor
        self._hosts: list[str] = self.ranks.gather(node_name())

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        if self.ranks.size == 1:
            return
        self._work.append(self.work())
        if len(self._work) == EVERY:
            medians = torch.zeros(self.ranks.size, dtype=torch.float64, device=HOST)
            medians[self.ranks.rank] = statistics.median(self._work)
            self._work.clear()
            self._tell(progress.step, self.ranks.sum(medians).tolist())

    def work(self) -> float:
        """Seconds of this rank's own work in the step that has just been made."""
        took, worked, by_clock = self.where.took, self.where.worked, self.where.has_clock
        work = worked["forward_backward"] + worked["update"] + (worked["agree"] if by_clock else 0.0)
        # Ranks with the same sequences get them from the first of them, and so wait for another.
        return work + (took["data"] if self.ranks.reads else worked["data"] if by_clock else 0.0)

    def _tell(self, step: int, medians: list[float]) -> None:
        """By rank 0 alone; on the others nobody listens."""
        if not self.ranks.first:
            return
        middle = statistics.median(medians)
        order = sorted(range(len(medians)), key=lambda rank: -medians[rank])
        slowest = {"slowest": order[0], "host": self._hosts[order[0]]}
        self._run.emit("ranks", step=step, min_s=min(medians), median_s=middle, max_s=max(medians), **slowest)
        for rank in order[:NAMED]:
            if medians[rank] > self._factor * middle:
                self._run.emit(
                    "slow_rank",
                    step=step,
                    rank=rank,
                    host=self._hosts[rank],
                    work_s=medians[rank],
                    median_s=middle,
                )
