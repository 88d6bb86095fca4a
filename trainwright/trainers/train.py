"""The verb `train`: puts a run together, hands it to the loop, and ends it."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from trainwright.configs.schema import Recipe
from trainwright.errors import NumericalFailure, Preempted, RunFailed
from trainwright.trainers.checkpoint.load import newest_whole, read_progress, read_state, require_whole
from trainwright.trainers.checkpoint.place import Place, place
from trainwright.trainers.checkpoint.save import CONFIG, Saver
from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.data.dealing import own_cursor
from trainwright.trainers.flops import training_flops_per_token
from trainwright.trainers.health.check import Health, check_health
from trainwright.trainers.loop import train_steps, validation_loss
from trainwright.trainers.observers import build_observers
from trainwright.trainers.observers.base import Observer, Observers, Run
from trainwright.trainers.observers.checkpoint import Checkpoints
from trainwright.trainers.parallel.apply import parallelize
from trainwright.trainers.parallel.ranks import Ranks, open_ranks
from trainwright.trainers.parallel.shards import local_pieces
from trainwright.trainers.platform import choose_platform
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.precision import PRECISIONS
from trainwright.trainers.progress import Progress
from trainwright.trainers.resilience.fatal_batch import Deaths, earlier_deaths
from trainwright.trainers.resilience.pace import Pace
from trainwright.trainers.resilience.watchdog import Passing, Watchdog
from trainwright.trainers.resilience.whereabouts import Whereabouts
from trainwright.trainers.resilience.wishes import Wishes, ending_on_notice, stopping_on_notice
from trainwright.trainers.run_folder import (
    check_same_run,
    checkpoint_folder,
    config_text,
    make_room,
    run_folder,
    set_aside,
    starts_afresh,
)
from trainwright.trainers.steppers.base import Stepper
from trainwright.trainers.steppers.eager import EagerStepper
from trainwright.trainers.tasks.base import Task
from trainwright.trainers.tasks.pretrain import Pretraining


@dataclass(frozen=True)
class Start:
    """Where a run begins: `checkpoint` None is a fresh one. The progress has the whole cursor."""

    checkpoint: Place | None
    progress: Progress
    passed_over: list[tuple[Place, str]]
    deaths: Deaths


def train(recipe: Recipe, observers: Sequence[Observer] = ()) -> None:
    """Run `recipe` to its end, going on from its newest whole checkpoint.

    observers: the caller's own, called on every rank after the recipe's, which rank 0 alone has.

    Raises:
        BadRequest: the data, the device, or a checkpoint that was named can't be used.
        RunFailed: the last checkpoint can't be saved.
        BadNode: this rank's node isn't fit to train on; on the other nodes that is a RunFailed.
        Preempted: SIGTERM or SIGUSR1 came, and what was done is saved.
    """
    platform = choose_platform(recipe.platform)
    platform.prepare()
    folder = run_folder(recipe)
    with (
        ending_on_notice(),
        open_ranks(recipe.parallel, platform) as ranks,
        Watchdog(recipe.resilience, folder, ranks, platform) as where,
    ):
        health = check_health(recipe, ranks, platform) if recipe.health.check else None
        start = find_start(recipe, ranks)
        if _finished(start.progress, recipe):
            if ranks.first:
                _say_finished(recipe, folder, start.progress)
            return
        task = Pretraining(recipe, ranks)
        stepper, parameters = build_stepper(recipe, task, ranks, platform, start.checkpoint)
        config = config_text(recipe, platform.describe())
        if ranks.first:
            open_folder(recipe, folder, config)
        wishes = Wishes()
        saver = Saver(checkpoint_folder(recipe), config, ranks.aside(), recipe.checkpoint)
        checkpoints = Checkpoints(stepper.state_dict, saver, wishes, ranks)
        said = build_observers(recipe, folder) if ranks.first else []
        # A save may take longer than a step's bound.
        saves = Passing(where, "save"), checkpoints, Passing(where, "observers")
        watching = Observers([Pace(where, ranks), *said, *saves, *observers])
        run = Run(recipe, folder, task.total_steps(), parameters, ranks.size, watching.emit)
        with stopping_on_notice(wishes):
            _train(run, task, stepper, start, health, checkpoints, watching, wishes, where, ranks, platform)
        if ranks.first:
            print(f"report={folder / 'report.html'}", flush=True)


def _finished(progress: Progress, recipe: Recipe) -> bool:
    return progress.ended or progress.step >= (recipe.train.steps or math.inf)


def build_stepper(
    recipe: Recipe, task: Task, ranks: Ranks, platform: Platform, checkpoint: Place | None
) -> tuple[EagerStepper, int]:
    """The task's model on its ranks, with initial weights or a checkpoint's, and its number of parameters."""
    model = task.build_model(platform)
    parameters = sum(p.numel() for p in model.parameters())
    computes_in = PRECISIONS[recipe.precision.mode].computes_in
    layout = parallelize(model, *task.plan(), ranks, recipe.parallel, computes_in, platform)
    if checkpoint is None:
        task.fill(local_pieces(model))
    stepper = EagerStepper(model, task.loss, recipe, layout, platform.device)
    if checkpoint is not None:
        state = stepper.state_dict()
        read_state(checkpoint, state, alone=ranks.size == 1)
        stepper.load_state_dict(state)
    return stepper, parameters


def _train(
    run: Run,
    task: Task,
    stepper: Stepper,
    start: Start,
    health: Health | None,
    checkpoints: Checkpoints,
    watching: Observers,
    wishes: Wishes,
    where: Whereabouts,
    ranks: Ranks,
    platform: Platform,
) -> None:
    recipe, progress = run.recipe, start.progress
    validation = task.open_validation()
    with task.open_stream(progress.cursor if start.checkpoint else None) as stream:
        progress.cursor = own_cursor(progress.cursor, ranks)
        watching.on_start(run, progress)
        _say_start(run, start)
        if health:
            run.emit("health", **health.event())
        if validation:
            run.emit("unigram", nats=unigram_entropy(validation, recipe.model.vocab_size, ranks))
        reason = "done"
        try:
            train_steps(
                progress=progress,
                stepper=stepper,
                stream=stream,
                validation=validation,
                observer=watching,
                wishes=wishes,
                where=where,
                left_out=start.deaths.left_out,
                ranks=ranks,
                platform=platform,
                train=recipe.train,
                optim=recipe.optim,
                total_steps=run.total_steps,
                flops_per_token=training_flops_per_token(recipe.model, recipe.train.seq_len),
                peak_flops=platform.peak_flops(PRECISIONS[recipe.precision.mode].computes_in),
            )
            where.at("save", progress.step)
            if progress.ended and validation:
                val_loss = validation_loss(stepper, validation, ranks)
                run.emit("validation", step=progress.step, val_loss=val_loss)
            checkpoint = checkpoints.save_last(progress)
            if wishes.agreed_stop and not _finished(progress, recipe):
                raise Preempted(
                    f"{wishes.stop or 'a signal to another rank'} stopped the run after step {progress.step}, "
                    f"which is saved as {checkpoint}: the same command goes on from there"
                )
            if ranks.first and (sample := task.sample(checkpoint)):
                run.emit("sample", step=progress.step, **sample)
        except NumericalFailure as error:
            reason = f"NumericalFailure: {error}"
            if recipe.resilience.pass_over_batch and progress.step + 1 not in start.deaths.blamed:
                raise RunFailed(f"{error}; or start again to see whether it is the batch") from error
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            run.emit("stop", step=progress.step, reason=reason)
            watching.on_stop(progress, reason)


def open_folder(recipe: Recipe, folder: Path, config: str) -> None:
    """Make the run's folder, moving aside what a fresh start finds there."""
    if starts_afresh(recipe):
        set_aside(folder)
        make_room(checkpoint_folder(recipe))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)


def find_start(recipe: Recipe, ranks: Ranks) -> Start:
    """The run's own newest whole checkpoint, else the one that `resume` names, else the beginning.

    A run that was started from a named checkpoint and restarted by the same command goes on from where it
    had come to, not from the named one again. All ranks call it.

    Raises:
        BadRequest: the named checkpoint isn't whole, or is of another stream of data.
    """
    passed_over: list[tuple[Place, str]] = []
    path, afresh = None, ranks.share(starts_afresh(recipe))
    if not afresh:
        path = newest_whole(checkpoint_folder(recipe), ranks, lambda *fault: passed_over.append(fault))
    if path is None and recipe.resume not in ("auto", "none"):
        path = require_whole(place(recipe.resume), ranks)
    deaths = Deaths() if afresh else earlier_deaths(run_folder(recipe), recipe.resilience.pass_over_batch)
    progress = _read_progress(path, recipe) if ranks.first else None
    return Start(path, *ranks.share((progress, passed_over, deaths)))


def _read_progress(path: Place | None, recipe: Recipe) -> Progress:
    if path is None:
        return Progress(0, 0, np.empty((0, 0), np.int64))
    before = OmegaConf.create((path / CONFIG).read_text())
    check_same_run(recipe, before, path)
    progress = read_progress(path)
    progress.ended = progress.ended and OmegaConf.select(before, "train.epochs") == recipe.train.epochs
    return progress


def _say_start(run: Run, start: Start) -> None:
    deaths = start.deaths
    for path, wrong in start.passed_over:
        run.emit("checkpoint_passed_over", path=str(path), reason=wrong)
    if start.checkpoint is None:
        said = {"parameters": run.parameters, "folder": str(run.folder)}
        run.emit("start", world_size=run.ranks, died_in=deaths.died_in, **said)
    else:
        said = {"step": start.progress.step, "path": str(start.checkpoint)}
        run.emit("resume", world_size=run.ranks, died_in=deaths.died_in, **said)
    if deaths.twice:
        leaves_out = run.recipe.resilience.pass_over_batch
        run.emit("batch_left_out" if leaves_out else "batch_killed_twice", step=deaths.died_in)


def unigram_entropy(batches: list[Batch], words: int, ranks: Ranks) -> float:
    """The entropy in nats of single target tokens: the loss of a model that only knows how often each is.

    batches: this rank's share. words: the size of the vocabulary.
    """
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    counts = torch.bincount(targets[targets != IGNORE], minlength=words).double()
    counts = ranks.sum(counts)
    probabilities = counts / counts.sum()
    seen = probabilities[probabilities > 0]
    return float(-(seen * seen.log()).sum())


def _say_finished(recipe: Recipe, folder: Path, progress: Progress) -> None:
    why, more = "it is finished", f"train.steps={2 * progress.step}"
    if progress.ended:
        why, more = "its data has ended", f"train.epochs={(recipe.train.epochs or 0) + 1}"
    print(
        f"{folder} is at step {progress.step} and {why}: go on with run.name={recipe.run.name} {more}, "
        "or start afresh with resume=none",
        file=sys.stderr,
    )
