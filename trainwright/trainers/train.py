"""The verb `train`: puts a run together, hands it to the loop, and ends it."""

from collections.abc import Sequence

import torch

from trainwright.configs.schema import Recipe
from trainwright.errors import NumericalFailure, Preempted, RunFailed
from trainwright.trainers.checkpoint.load import read_state
from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.checkpoint.save import Saver
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
from trainwright.trainers.resilience.pace import Pace
from trainwright.trainers.resilience.watchdog import Passing, Watchdog
from trainwright.trainers.resilience.whereabouts import Whereabouts
from trainwright.trainers.resilience.wishes import Wishes, stopping_on_notice
from trainwright.trainers.run_folder import checkpoint_folder, config_text, run_folder
from trainwright.trainers.start import Start, find_start, open_folder, say_finished, say_start
from trainwright.trainers.steppers.base import Stepper
from trainwright.trainers.steppers.eager import EagerStepper
from trainwright.trainers.tasks.base import Task
from trainwright.trainers.tasks.pretrain import Pretraining


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
        stepper, parameters = build_stepper(recipe, task, ranks, platform, start.checkpoint)
        config = config_text(recipe, platform.describe())
        if ranks.first:
            open_folder(recipe, folder, config, start.afresh)
        wishes = Wishes()
        damaged = [path.name for path, _ in start.passed_over]
        saver = Saver(
            checkpoint_folder(recipe), config, ranks.aside(), platform, recipe.checkpoint, damaged=damaged
        )
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
        say_start(run, start)
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
            if wishes.agreed_stop and not start.finished(recipe):
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
            where.at("save", progress.step)  # trackers may take longer to finish than a step's bound
            try:
                run.emit("stop", step=progress.step, reason=reason)
            finally:
                watching.on_stop(progress, reason)


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
