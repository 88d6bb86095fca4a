"""The training loop: one for every task, stepper and device."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from trainwright import verdict
from trainwright.configs.schema import OptimConfig, TrainConfig
from trainwright.errors import NumericalFailure
from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.facts import agree, count_all
from trainwright.trainers.observers.base import Metrics, Observer
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.progress import Progress
from trainwright.trainers.resilience.whereabouts import Whereabouts
from trainwright.trainers.resilience.wishes import Wishes
from trainwright.trainers.schedule import learning_rate
from trainwright.trainers.steppers.base import Stepper


def train_steps(
    *,
    progress: Progress,
    stepper: Stepper,
    stream: Iterator[Batch],
    validation: Sequence[Batch] | None,
    observer: Observer,
    wishes: Wishes,
    where: Whereabouts,
    left_out: Counter[int],
    ranks: Ranks,
    platform: Platform,
    train: TrainConfig,
    optim: OptimConfig,
    total_steps: int | None,
    flops_per_token: float,
    peak_flops: float | None,
) -> None:
    """Train from `progress` to the last step or the data's end, or until a rank wishes to stop.

    Keeps `progress` true.

    left_out: by step, how many batches to leave out before it. total_steps: where the schedule ends.
    flops_per_token, peak_flops: for `mfu`, which isn't told where the device's peak isn't known.
    `param_norm` is that of the weights that made the step's loss.
    """
    upcoming = next(stream)
    count = count_all(upcoming, ranks, platform.device)
    while train.steps is None or progress.step < train.steps:
        started = time.perf_counter()
        batch, (target_tokens, ended) = upcoming, count
        if ended:
            progress.ended = True
            break
        # Not a step: where lanes of this turn are past their end and others aren't, or the batch kills the run.
        if target_tokens == 0 or left_out[progress.step + 1] > 0:
            left_out[progress.step + 1] -= target_tokens > 0
            where.at("data", progress.step + 1)
            progress.cursor, upcoming = batch.cursor, next(stream)
            count = count_all(upcoming, ranks, platform.device)
            continue

        where.at("forward_backward", progress.step + 1)
        loss_sum = stepper.forward_backward(batch, target_tokens)
        where.at("data", progress.step + 1)
        asked = time.perf_counter()
        upcoming = next(stream)
        data_time = time.perf_counter() - asked
        where.at("agree", progress.step + 1)
        facts = agree(loss_sum / target_tokens, stepper.squares(), upcoming, wishes, ranks)
        where.at("update", progress.step + 1)
        lr = learning_rate(optim, total_steps, progress.step + 1)
        stepper.update(lr, facts.grad_norm, optim.clip)
        loss, grad_norm, param_norm, count = facts.read(wishes)
        step_time = time.perf_counter() - started
        if not all(map(math.isfinite, (loss, grad_norm, param_norm))):
            raise NumericalFailure(
                f"step {progress.step + 1} has loss {loss}, gradient norm {grad_norm} and parameter norm "
                f"{param_norm}: lower optim.lr or raise optim.warmup_steps, and start again"
            )

        progress.step += 1
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
            "tokens_per_s": target_tokens / step_time,
            "step_time_s": step_time,
            "data_time_s": data_time,
            "memory_gib": platform.memory_gib(),
            "epoch": batch.epoch,
        }
        if peak_flops is not None:
            metrics["mfu"] = target_tokens * flops_per_token / step_time / (peak_flops * ranks.size)
        if validation and _validates(progress.step, train):
            where.at("validation", progress.step)
            metrics["val_loss"] = validation_loss(stepper, validation, ranks)
        where.at("observers", progress.step)
        observer.on_step(progress, metrics)
        if wishes.agreed_stop:
            break


def _validates(step: int, train: TrainConfig) -> bool:
    return step == train.steps or (train.validate_every is not None and step % train.validate_every == 0)


def validation_loss(stepper: Stepper, validation: Sequence[Batch], ranks: Ranks) -> float:
    """The mean loss of the validation batches' target tokens over all ranks, in nats."""
    total = torch.stack([stepper.evaluate(batch) for batch in validation]).sum()
    targets = sum(int((batch.targets != IGNORE).sum()) for batch in validation) if ranks.tp_rank == 0 else 0
    both = ranks.sum(torch.stack((total, total.new_tensor(targets))))
    return float(both[0] / both[1])
