"""The training loop: one for every task, stepper and device."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from trainwright import verdict
from trainwright.configs.schema import OptimConfig, TrainConfig
from trainwright.errors import Diverged, NumericalFailure
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.facts import add_up, agree, count_all, in_all, targets_of
from trainwright.trainers.meter import Meter
from trainwright.trainers.observers.base import Metrics, Observer
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.progress import Progress
from trainwright.trainers.resilience.whereabouts import Whereabouts
from trainwright.trainers.resilience.wishes import Wishes
from trainwright.trainers.schedule import learning_rate
from trainwright.trainers.stability import OF_A_BATCH, Judgement, Monitor, RollBack
from trainwright.trainers.steppers.base import Stepper


def train_steps(
    *,
    progress: Progress,
    stepper: Stepper,
    stream: Iterator[Batch],
    validation: Sequence[Batch] | None,
    observer: Observer,
    monitor: Monitor,
    meter: Meter,
    wishes: Wishes,
    where: Whereabouts,
    left_out: Counter[int],
    ranks: Ranks,
    platform: Platform,
    train: TrainConfig,
    optim: OptimConfig,
    total_steps: int | None,
) -> None:
    """Train from `progress` to the last step or the data's end, or until a rank wishes to stop.

    Keeps `progress` true.

    left_out: by step, how many batches to leave out before it. total_steps: where the schedule ends.
    `param_norm` is that of the weights that made the step's loss.

    Raises:
        RollBack: the monitor wants to go on from an earlier step.
        NumericalFailure: it wants to stop. Progress is that of the step before.
    """
    upcoming = next(stream)
    count = count_all(upcoming, ranks, platform.device)
    while train.steps is None or progress.step < train.steps:
        started, step = time.perf_counter(), progress.step + 1
        batch, (target_tokens, ended) = upcoming, count
        if ended:
            progress.ended = True
            break
        # Not a step: where lanes of this turn are past their end and others aren't, or the batch is a bad one.
        if target_tokens == 0 or left_out[step] > 0:
            left_out[step] -= target_tokens > 0
            where.at("data", step)
            progress.cursor, upcoming = batch.cursor, next(stream)
            count = count_all(upcoming, ranks, platform.device)
            continue

        where.at("forward_backward", step)
        loss_sum = stepper.forward_backward(batch, target_tokens)
        where.at("data", step)
        asked = time.perf_counter()
        upcoming = next(stream)
        data_time = time.perf_counter() - asked
        where.at("agree", step)
        measured = stepper.measured()
        others = loss_sum.new_tensor([]) if not measured else torch.stack([*measured.values()]) / target_tokens
        facts = agree(loss_sum / target_tokens, stepper.squares(), others, upcoming, wishes, ranks)
        where.at("update", step)
        lr = learning_rate(optim, total_steps, step)
        # An update that may be skipped waits for the step's numbers; any other is under way before they come.
        waits = monitor.skips
        if not waits:
            stepper.update(lr, facts.grad_norm, optim.clip)
        loss, grad_norm, param_norm, count, means = facts.read(wishes)
        judgement = monitor.look(step, loss, grad_norm, param_norm)
        if waits:
            stepper.update(lr, facts.grad_norm, optim.clip, skip=judgement.skip)
        step_time = time.perf_counter() - started
        _heed(judgement, step, observer)

        progress.step = step
        progress.tokens += target_tokens
        progress.cursor = batch.cursor
        verdict.worked()
        metrics: Metrics = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "epoch": batch.epoch,
            **dict(zip(measured, means, strict=True)),
            **meter.speed(target_tokens, step_time, data_time),
        }
        if validation and _validates(step, train):
            where.at("validation", step)
            metrics["val_loss"] = validation_loss(stepper, validation, ranks)
        where.at("observers", step)
        observer.on_step(progress, metrics)
        if wishes.agreed_stop:
            break


def _heed(judgement: Judgement, step: int, observer: Observer) -> None:
    """Tell what was found in `step`, and end the steps if that is the answer."""
    if judgement.ended:
        observer.on_event("spike", judgement.ended.event())
    for found in judgement.findings:
        said = {"finding": found.kind, "answer": found.answer, "said": found.said}
        observer.on_event("warning", {"step": step, **said})
    worst = judgement.worst
    if worst and worst.answer == "rollback":
        raise RollBack(worst.began, step, worst.said)
    if worst and worst.answer == "stop":
        failure = NumericalFailure if worst.kind in OF_A_BATCH else Diverged
        raise failure(f"{worst.said}: lower optim.lr or raise optim.warmup_steps, and start again")


def _validates(step: int, train: TrainConfig) -> bool:
    return step == train.steps or (train.validate_every is not None and step % train.validate_every == 0)


def validation_loss(stepper: Stepper, validation: Sequence[Batch], ranks: Ranks) -> float:
    """The mean loss of the validation batches' target tokens over all ranks, in nats."""
    total = torch.stack([stepper.evaluate(batch) for batch in validation]).sum()
    counts = map(sum, zip(*map(targets_of, validation), strict=True)) if ranks.reads else (0.0, 0.0)
    loss, targets = add_up(total.reshape(1), [*counts], ranks)
    return float(loss) / (in_all(*targets.tolist()) or math.nan)
