"""The verb `train`: puts a run together, hands it to the loop, and ends it."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainwright.configs.schema import Recipe
from trainwright.errors import Diverged, NumericalFailure, Preempted, RunFailed
from trainwright.trainers.build import build_stepper
from trainwright.trainers.checkpoint.save import Saver, forget_from
from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.data.dealing import own_cursor
from trainwright.trainers.flops import training_flops_per_token
from trainwright.trainers.health.check import Health, check_health
from trainwright.trainers.loop import train_steps, validation_loss
from trainwright.trainers.meter import Meter
from trainwright.trainers.observers import build_observers
from trainwright.trainers.observers.base import Observer, Observers, Run
from trainwright.trainers.observers.checkpoint import Checkpoints
from trainwright.trainers.parallel.ranks import Ranks, open_ranks
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.platform.choose import choose_platform
from trainwright.trainers.precision import PRECISIONS
from trainwright.trainers.resilience.pace import Pace
from trainwright.trainers.resilience.watchdog import Passing, Watchdog
from trainwright.trainers.resilience.whereabouts import Whereabouts
from trainwright.trainers.resilience.wishes import Wishes, stopping_on_notice
from trainwright.trainers.run_folder import checkpoint_folder, config_text, run_folder
from trainwright.trainers.stability import RollBack
from trainwright.trainers.start import Start, find_start, has_start_before, open_folder, say_finished, say_start
from trainwright.trainers.steppers.base import Stepper
from trainwright.trainers.tasks.base import Task
from trainwright.trainers.tasks.pretrain import Pretraining


@dataclass(frozen=True)
class Process:
    """What stays while the run begins in this process, as it does again after a rollback."""

    recipe: Recipe
    folder: Path
    ranks: Ranks
    beside: Ranks  # the same, for the thread that saves
    platform: Platform
    where: Whereabouts
    wishes: Wishes
    observers: Sequence[Observer]  # the caller's


@dataclass(frozen=True)
class Attempt:
    """What is made anew each time that the run begins."""

    start: Start
    run: Run
    stepper: Stepper
    checkpoints: Checkpoints
    watching: Observers


def train(recipe: Recipe, observers: Sequence[Observer] = ()) -> None:
    """Run `recipe` to its end, going on from its newest whole checkpoint.

    observers: the caller's own, called on every rank after the recipe's, which rank 0 alone has.

    Raises:
        BadRequest: the data, the device, or a checkpoint that was named can't be used.
        RunFailed: the last checkpoint can't be saved, or the device failed and may do better.
        BadNode: this rank's node isn't fit to train on; on the other nodes that is a RunFailed.
        NumericalFailure: a step's numbers are what the recipe stops at, or what the device stops at.
        Preempted: SIGTERM or SIGUSR1 came, and what was done is saved.
    """
    platform = choose_platform(recipe.platform)
    platform.prepare()
    if recipe.precision.rounding == "hardware":
        platform.round_stochastically(recipe.seed)
    if recipe.train.compile:
        platform.require_compiler()
    folder = run_folder(recipe)
    with (
        platform.explaining(),
        open_ranks(recipe.parallel, platform) as ranks,
        Watchdog(recipe.resilience, folder, ranks, platform) as where,
    ):
        health = check_health(recipe, ranks, platform) if recipe.health.check else None
        start = find_start(recipe, ranks)
        if start.finished(recipe):
            if ranks.first:
                say_finished(recipe, folder, start.progress)
            return
        task = Pretraining(recipe, ranks)
        process = Process(recipe, folder, ranks, ranks.aside(), platform, where, Wishes(), observers)
        again = False
        while not _train(process, task, _begin(process, task, start, again), health):
            gc.collect()  # the model that went wrong leaves its memory to the next
            where.begin_again()
            start, health, again = find_start(recipe, ranks, again=True), None, True
        if ranks.first:
            print(f"report={folder / 'report.html'}", flush=True)


def _begin(process: Process, task: Task, start: Start, again: bool) -> Attempt:
    """Build what trains from `start`, and open the run's folder. again: after a rollback."""
    recipe, folder, ranks, where = process.recipe, process.folder, process.ranks, process.where
    stepper, parameters = build_stepper(recipe, task, ranks, process.platform, start.checkpoint)
    config = config_text(recipe, process.platform.describe())
    if ranks.first:
        open_folder(recipe, folder, config, start.afresh)
    damaged = [path.name for path, _ in start.passed_over]
    saves_to = checkpoint_folder(recipe)
    saver = Saver(saves_to, config, process.beside, process.platform, recipe.checkpoint, damaged=damaged)
    checkpoints = Checkpoints(stepper.state_dict, saver, start.monitor, process.wishes, ranks)
    said = build_observers(recipe, folder) if ranks.first else []
    # A save may take longer than a step's bound.
    saves = Passing(where, "save"), checkpoints, Passing(where, "observers")
    watching = Observers([Pace(where, ranks), *said, *saves, *process.observers])
    run = Run(recipe, folder, task.total_steps(), parameters, ranks.size, watching.emit, again)
    return Attempt(start, run, stepper, checkpoints, watching)


def _train(process: Process, task: Task, attempt: Attempt, health: Health | None) -> bool:
    """Train until the run ends; False where it is rolled back and has to begin again.

    Raises:
        Preempted: a rank was asked to stop, also where the run is rolled back.
    """
    recipe, ranks, start = process.recipe, process.ranks, attempt.start
    run, watching, progress = attempt.run, attempt.watching, start.progress
    validation = task.open_validation()
    cursor = progress.cursor if start.checkpoint else None
    with stopping_on_notice(process.wishes), task.open_stream(cursor) as stream:
        progress.cursor = own_cursor(progress.cursor, ranks)
        watching.on_start(run, progress)
        say_start(run, start)
        if health:
            run.emit("health", **health.event())
        if validation:
            run.emit("unigram", nats=unigram_entropy(validation, recipe.model.vocab_size, ranks))
        back = None
        try:
            with process.platform.explaining():
                back = _make_steps(process, task, attempt, stream, validation)
            reason = f"rolled back: {back}" if back else "done"
            if back and process.wishes.agreed_stop:
                raise Preempted(
                    f"{process.wishes.stop or 'a signal to another rank'} stopped the run, which has been "
                    f"rolled back to before step {back.began}: the same command goes on from there"
                )
        except NumericalFailure as error:
            reason = f"{type(error).__name__}: {error}"
            batch = recipe.resilience.pass_over_batch and not isinstance(error, Diverged)
            if batch and progress.step + 1 not in start.deaths.blamed:
                raise RunFailed(f"{error}; or start again to see whether it is the batch") from error
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            process.where.at("save", progress.step)  # trackers may take longer to finish than a step's bound
            try:
                if start.monitor.spike:
                    run.emit("spike", **start.monitor.spike.event())
                if back:
                    run.emit("rollback", step=back.step, began=back.began, reason=str(back))
                if not back or process.wishes.agreed_stop:
                    run.emit("stop", step=progress.step, reason=reason)
            finally:
                watching.on_stop(progress, reason)
    return back is None


def _make_steps(
    process: Process,
    task: Task,
    attempt: Attempt,
    stream: Iterator[Batch],
    validation: list[Batch] | None,
) -> RollBack | None:
    """The steps, and what comes after the last of them; the rollback, if that is how they end."""
    recipe, platform, start = process.recipe, process.platform, attempt.start
    peak_flops = platform.peak_flops(PRECISIONS[recipe.precision.mode].computes_in)
    flops_per_token = training_flops_per_token(recipe.model, recipe.train.seq_len)
    try:
        train_steps(
            progress=start.progress,
            stepper=attempt.stepper,
            stream=stream,
            validation=validation,
            observer=attempt.watching,
            monitor=start.monitor,
            meter=Meter(platform, process.ranks, flops_per_token, peak_flops),
            wishes=process.wishes,
            where=process.where,
            left_out=start.deaths.left_out,
            ranks=process.ranks,
            platform=platform,
            train=recipe.train,
            optim=recipe.optim,
            total_steps=attempt.run.total_steps,
        )
    except RollBack as back:
        # Before a save is waited for: the ledger has that apart from the step that went wrong.
        attempt.run.emit("rollback_begun", step=back.step)
        _drop_checkpoints(process, attempt.checkpoints, back)
        return back.with_traceback(None)  # which would keep the model
    _finish(process, task, attempt, validation)
    return None


def _drop_checkpoints(process: Process, checkpoints: Checkpoints, back: RollBack) -> None:
    """Delete the checkpoints from step `back.began` on, if the run has where to begin before it.

    Raises:
        Diverged: it hasn't; all checkpoints stay.
        RunFailed: one can't be read or deleted.
    """
    process.where.at("save", back.step)
    checkpoints.settle()
    if not has_start_before(process.recipe, process.ranks, back.began):
        raise Diverged(
            f"{back}, and no whole checkpoint from before step {back.began} is left: name one with resume=PATH "
            "in a run of another name, or start afresh with resume=none"
        )
    folder = checkpoint_folder(process.recipe)
    try:
        forget_from(folder, back.began, process.ranks)
    except OSError as error:
        raise RunFailed(
            f"the checkpoints in {folder} from step {back.began} on couldn't be deleted ({error}): do it, "
            "and start again"
        ) from error


def _finish(process: Process, task: Task, attempt: Attempt, validation: list[Batch] | None) -> None:
    """Save the end of the run and show what it has learnt.

    Raises:
        Preempted: it isn't the end: a rank was asked to stop.
    """
    recipe, ranks, wishes = process.recipe, process.ranks, process.wishes
    run, start, progress = attempt.run, attempt.start, attempt.start.progress
    process.where.at("save", progress.step)
    if progress.ended and validation:
        val_loss = validation_loss(attempt.stepper, validation, ranks)
        run.emit("validation", step=progress.step, val_loss=val_loss)
    checkpoint = attempt.checkpoints.save_last(progress)
    if wishes.agreed_stop and not start.finished(recipe):
        raise Preempted(
            f"{wishes.stop or 'a signal to another rank'} stopped the run after step {progress.step}, "
            f"which is saved as {checkpoint}: the same command goes on from there"
        )
    if ranks.first and (sample := task.sample(checkpoint)):
        run.emit("sample", step=progress.step, **sample)


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
