"""Saves the run every `checkpoint.every` steps or `checkpoint.minutes`, and at its end."""

import math
import time
from collections.abc import Callable
from typing import Any

from trainwright.errors import RunFailed
from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.checkpoint.save import Saved, Saver, step_name
from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.plan.goodput import best_interval
from trainwright.trainers.resilience.wishes import Wishes
from trainwright.trainers.stability import Monitor

MEASURED_AT = 10  # auto: how many steps come before the first save, which shows what a save costs


class Checkpoints(Observer):
    """A save that fails leaves the last good one, is said, and doesn't stop the run. Every rank has one."""

    def __init__(
        self,
        state_dict: Callable[[], dict[str, Any]],
        saver: Saver,
        monitor: Monitor,
        wishes: Wishes,
        ranks: Ranks,
    ) -> None:
        self.state_dict = state_dict
        self.saver = saver
        self.monitor = monitor
        self.wishes = wishes
        self.ranks = ranks
        self._stall = 0.0
        self._interval = math.inf  # seconds
        self._measures_at: int | None = None  # auto: the step whose save is to show what saves cost
        self._measuring = False  # whether the save that is being written is that one
        self._step = 0
        self._saved_step = -1

    def on_start(self, run: Run, progress: Progress) -> None:
        self.run = run
        self._saved_step = progress.step
        self._path = self.saver.folder / step_name(progress.step)
        self._begun = time.monotonic()
        policy = run.recipe.checkpoint
        if policy.minutes is not None:
            self._interval = 60 * policy.minutes
        if policy.every == "auto":
            self._measures_at = progress.step + MEASURED_AT
        if policy.every is not None or policy.minutes is not None:
            self.saver.copy(self.state_dict())
        self._ask(progress)

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        self._hear()
        every = self.run.recipe.checkpoint.every
        if self.wishes.agreed_save or (isinstance(every, int) and progress.step % every == 0):
            self._begin(progress)
            self.wishes.save = False
        self._ask(progress)

    def on_stop(self, progress: Progress, reason: str) -> None:
        self.saver.settle()

    def settle(self) -> None:
        """Wait until nothing is being written."""
        self._hear(wait=True)

    def save_last(self, progress: Progress) -> Place:
        """Save the end of the run, unless that has just been done, and say where it is.

        Raises:
            RunFailed: it can't be saved.
        """
        self._hear(wait=True)
        if progress.step != self._saved_step or progress.ended:
            self._begin(progress)
            ended = self._hear(wait=True)
            if ended and ended.wrong:
                raise RunFailed(
                    f"the last checkpoint couldn't be saved ({ended.wrong}): make room and start again, and "
                    "the run goes on from the one before"
                ) from ended.wrong
        return self._path

    def _ask(self, progress: Progress) -> None:
        """Wish for a save after the next step, if the time for it has come; it waits for one being written.

        Clocks differ: rank 0's is the one that counts.
        """
        self._step = progress.step
        due = progress.step + 1 == self._measures_at
        late = time.monotonic() - self._begun >= self._interval
        self.wishes.save = self.wishes.save or (self.ranks.first and (due or late))
        self.wishes.busy = self.saver.busy

    def _begin(self, progress: Progress) -> None:
        """Save this very step: where one is due before the last has been written, training waits for that."""
        self._begun = time.monotonic()
        self._hear(wait=True)
        self.saver.copy(self.state_dict())
        self._stall = time.monotonic() - self._begun
        self._measuring = self._measures_at is not None
        # Before anything is written: a checkpoint must not reach the disk before the lines of its steps.
        self.run.emit("checkpoint_begun", step=progress.step, stall_s=self._stall)
        self.saver.begin(progress, self.monitor.suspect_from)

    def _hear(self, *, wait: bool = False) -> Saved | None:
        """Tell of the save that has ended since the last time."""
        ended = self.saver.ended(wait=wait)
        if ended is None:
            return None
        if ended.wrong:
            self.run.emit("checkpoint_failed", step=ended.step, reason=str(ended.wrong))
            if self._measuring:
                self._measures_at = self._step + MEASURED_AT
            return ended
        self._saved_step, self._path = ended.step, ended.path
        said = {"path": str(ended.path), "write_s": ended.write_s, "bytes": ended.bytes, "waited": wait}
        self.run.emit("checkpoint", step=ended.step, **said)
        if self._measuring:
            self._choose_interval(ended.write_s)
        return ended

    def _choose_interval(self, write_s: float) -> None:
        cluster = self.run.recipe.cluster
        failures_per_hour = cluster.failures_per_node_hour * (cluster.nodes or self.ranks.nodes)
        if failures_per_hour > 0:
            best = best_interval(self._stall, write_s, 3600 / failures_per_hour)
            self._interval = min(self._interval, best)
            self.run.emit("checkpoint_interval", seconds=best, stall_s=self._stall, write_s=write_s)
        self._measures_at, self._measuring = None, False
