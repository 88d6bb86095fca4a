"""Where a run begins: which checkpoint it goes on from, what came before, and what is said of it."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from trainwright import verdict
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.checkpoint.load import newest_whole, read_progress, require_whole
from trainwright.trainers.checkpoint.manifest import read_together
from trainwright.trainers.checkpoint.place import Place, place
from trainwright.trainers.checkpoint.save import CONFIG
from trainwright.trainers.observers.base import Run
from trainwright.trainers.observers.json_lines import read_lines
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.progress import Progress
from trainwright.trainers.resilience.fatal_batch import Deaths, earlier_deaths
from trainwright.trainers.run_folder import (
    changed,
    check_same_run,
    checkpoint_folder,
    make_room,
    run_folder,
    set_aside,
    starts_afresh,
)
from trainwright.trainers.stability import Monitor

SEEN = ("loss", "grad_norm", "param_norm")  # by the monitor


@dataclass(frozen=True)
class Start:
    """Where a run begins: `checkpoint` None is a fresh one. The progress has the whole cursor.

    afresh: whether what an earlier run left has to make room. monitor: has seen the steps up to the progress.
    changed: the keys whose values the checkpoint was made with others of, see `run_folder.changed`.
    """

    checkpoint: Place | None
    afresh: bool
    progress: Progress
    passed_over: list[tuple[Place, str]]
    deaths: Deaths
    monitor: Monitor
    changed: dict[str, list[Any]]

    def finished(self, recipe: Recipe) -> bool:
        """Whether the run has come to its end, as its progress says now."""
        return self.progress.ended or self.progress.step >= (recipe.train.steps or math.inf)


def find_start(recipe: Recipe, ranks: Ranks, again: bool = False) -> Start:
    """The run's own newest whole checkpoint, else the one that `resume` names, else the beginning.

    A run that was started from a named checkpoint and restarted by the same command goes on from where it
    had come to, not from the named one again. All ranks call it.

    again: this process has begun the run before, so that `resume=none` has been done.

    Raises:
        BadRequest: the named checkpoint isn't whole, or is of another stream of data.
    """
    passed_over: list[tuple[Place, str]] = []
    path, afresh = None, not again and starts_afresh(recipe, ranks)
    if not afresh:
        path = newest_whole(checkpoint_folder(recipe), ranks, lambda *fault: passed_over.append(fault))
    if path is None and recipe.resume not in ("auto", "none"):
        path = require_whole(place(recipe.resume, "resume"), ranks)
    if not ranks.first:
        return Start(path, afresh, *ranks.share(None))
    deaths = Deaths() if afresh else earlier_deaths(run_folder(recipe), recipe.resilience.pass_over_batch)
    progress, other = _read_progress(path, recipe)
    monitor = _monitor(recipe, progress.step, deaths.rollbacks)
    return Start(path, afresh, *ranks.share((progress, passed_over, deaths, monitor, other)))


def has_start_before(recipe: Recipe, ranks: Ranks, step: int) -> bool:
    """Whether `find_start` has where to begin before `step` when the checkpoints from there on are gone.

    That is a whole checkpoint, the one that `resume` names, or the beginning. The beginning only where the run
    has had no checkpoint before `step`: one that is lost or damaged isn't made good by starting over. All
    ranks call it.

    Raises:
        RunFailed: one can't be read, which doesn't show that it is damaged.
    """
    folder = run_folder(recipe)
    if newest_whole(checkpoint_folder(recipe), ranks, lambda *fault: None, before=step):
        return True
    if recipe.resume in ("auto", "none"):
        return bool(ranks.share(step <= _first_stood(folder) if ranks.first else None))
    try:
        path = require_whole(place(recipe.resume, "resume"), ranks)
    except BadRequest:  # it was whole when the run began
        return False
    began = read_together(lambda: read_progress(path).step if ranks.first else None, path, ranks)[0]
    return bool(began < step)


def _first_stood(folder: Path) -> float:
    """The first step that a checkpoint of the run was of, also one that is no more; infinite if none was."""
    steps: list[float] = []
    for _, event in read_lines(folder / "events.jsonl"):
        if event.get("event") == "start":
            steps.clear()
        elif event.get("event") in ("checkpoint", "resume"):
            steps.append(event["step"])
    return min(steps, default=math.inf)


def _read_progress(path: Place | None, recipe: Recipe) -> tuple[Progress, dict[str, list[Any]]]:
    if path is None:
        return Progress(0, 0, np.empty((0, 0), np.int64)), {}
    before = OmegaConf.create((path / CONFIG).read_text())
    check_same_run(recipe, before, path)
    progress = read_progress(path)
    progress.ended = progress.ended and OmegaConf.select(before, "train.epochs") == recipe.train.epochs
    return progress, changed(recipe, before)


def _monitor(recipe: Recipe, step: int, rollbacks: int) -> Monitor:
    """As it was when the run was at `step`: it has seen what metrics.jsonl says of the steps up to there."""
    config = recipe.stability
    monitor = Monitor(config, recipe.optim.warmup_steps, config.rollbacks - rollbacks)
    for _, line in read_lines(run_folder(recipe) / "metrics.jsonl"):
        if line.keys() >= {"step", *SEEN} and line["step"] <= step:
            monitor.look(line["step"], *(math.nan if line[name] is None else line[name] for name in SEEN))
    return monitor


def open_folder(recipe: Recipe, folder: Path, config: str, afresh: bool) -> None:
    """Make the run's folder, moving aside what a fresh start finds there."""
    if afresh:
        if recipe.checkpoint.dir is not None:
            make_room(checkpoint_folder(recipe))
        set_aside(folder)
    verdict.note_opened()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)


def say_start(run: Run, start: Start) -> None:
    """The events of a beginning: what was passed over, where it starts, and how it died before."""
    deaths = start.deaths
    for path, wrong in start.passed_over:
        run.emit("checkpoint_passed_over", path=str(path), reason=wrong)
    if start.checkpoint is None:
        said = {"parameters": run.parameters, "folder": str(run.folder)}
        run.emit("start", world_size=run.ranks, died_in=deaths.died_in, **said)
    else:
        said = {"step": start.progress.step, "path": str(start.checkpoint)}
        said |= {"changed": start.changed} if start.changed else {}
        run.emit("resume", world_size=run.ranks, died_in=deaths.died_in, **said)
    if deaths.twice:
        leaves_out = run.recipe.resilience.pass_over_batch
        run.emit("batch_left_out" if leaves_out else "batch_killed_twice", step=deaths.died_in)


def say_finished(recipe: Recipe, folder: Path, progress: Progress) -> None:
    """Tell how to go on with a run that has nothing left to do."""
    why, more = "it is finished", f"train.steps={2 * progress.step}"
    if progress.ended:
        why, more = "its data has ended", f"train.epochs={(recipe.train.epochs or 0) + 1}"
    print(
        f"{folder} is at step {progress.step} and {why}: go on with run.name={recipe.run.name} {more}, "
        "or start afresh with resume=none",
        file=sys.stderr,
    )
