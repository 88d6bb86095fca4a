"""Saves the run every `checkpoint.every` steps and at its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainwright.errors import RunFailed
from trainwright.trainers.checkpoint.save import PREFIX, save_checkpoint
from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
from trainwright.trainers.parallel.ranks import Ranks


class Checkpoints(Observer):
    """A save that fails leaves the last good one, is said, and doesn't stop the run. Every rank has one."""

    def __init__(self, state_dict: Callable[[], dict[str, Any]], config: str, ranks: Ranks) -> None:
        self.state_dict = state_dict
        self.config = config
        self.ranks = ranks
        self._saved_step = -1

    def on_start(self, run: Run, progress: Progress) -> None:
        self.run = run
        self._saved_step = progress.step
        self._path = run.folder / "checkpoints" / f"{PREFIX}{progress.step:08d}"

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        every = self.run.recipe.checkpoint.every
        if isinstance(every, int) and progress.step % every == 0:
            try:
                self._save(progress)
            except OSError as error:
                self.run.emit("checkpoint_failed", step=progress.step, reason=str(error))

    def save_last(self, progress: Progress) -> Path:
        """Save the end of the run, unless that has just been done, and say where it is.

        Raises:
            RunFailed: it can't be saved.
        """
        if progress.step == self._saved_step and not progress.ended:
            return self._path
        try:
            return self._save(progress)
        except OSError as error:
            raise RunFailed(
                f"the last checkpoint couldn't be saved ({error}): make room and start again, and the run "
                "goes on from the one before"
            ) from error

    def _save(self, progress: Progress) -> Path:
        folder: Path = self.run.folder / "checkpoints"
        keep = self.run.recipe.checkpoint.keep
        path = save_checkpoint(folder, self.state_dict(), progress, self.config, self.ranks, keep=keep)
        self._saved_step = progress.step
        self._path = path
        self.run.emit("checkpoint", step=progress.step, path=str(path))
        return path
