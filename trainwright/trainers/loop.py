"""The training loop: one for every task, stepper and device."""

import math
import time
from collections.abc import Iterator, Sequence

import torch

from trainwright.configs.schema import OptimConfig, TrainConfig
from trainwright.errors import NumericalFailure
from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.observers.base import Metrics, Observer
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.progress import Progress
from trainwright.trainers.schedule import learning_rate
from trainwright.trainers.steppers.base import Stepper


def train_steps(
    *,
    progress: Progress,
    stepper: Stepper,
    stream: Iterator[Batch],
    validation: Sequence[Batch] | None,
    observer: Observer,
    platform: Platform,
    train: TrainConfig,
    optim: OptimConfig,
    total_steps: int | None,
    flops_per_token: float,
    peak_flops: float | None,
) -> None:
    """Train from `progress` to the last step or the data's end, whichever is first; keeps `progress` true.

    total_steps: where the schedule ends. flops_per_token, peak_flops: for `mfu`, which is left out where
    the device's peak isn't known.
    """
    while train.steps is None or progress.step < train.steps:
        started = time.perf_counter()
        batch = next(stream)
        data_time = time.perf_counter() - started
        if batch.ended:
            progress.ended = True
            break

        target_tokens = int((batch.targets != IGNORE).sum())
        if target_tokens == 0:  # lanes of this turn are past their end and others aren't: not a step
            progress.cursor = batch.cursor
            continue
        loss_sum = stepper.forward_backward(batch, target_tokens)
        grad_norm = stepper.grad_norm()
        lr = learning_rate(optim, total_steps, progress.step + 1)
        stepper.update(lr, optim.clip)
        param_norm = stepper.param_norm()
        facts = torch.stack((loss_sum / target_tokens, grad_norm, param_norm)).tolist()  # the one wait
        step_time = time.perf_counter() - started
        if not all(map(math.isfinite, facts)):
            raise NumericalFailure(
                f"step {progress.step + 1} has loss {facts[0]}, gradient norm {facts[1]} and parameter norm "
                f"{facts[2]}: lower optim.lr or raise optim.warmup_steps, and start again"
            )

        progress.step += 1
        progress.tokens += target_tokens
        progress.cursor = batch.cursor
        metrics: Metrics = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": facts[0],
            "lr": lr,
            "grad_norm": facts[1],
            "param_norm": facts[2],
            "tokens_per_s": target_tokens / step_time,
            "step_time_s": step_time,
            "data_time_s": data_time,
            "memory_gib": platform.memory_gib(),
            "epoch": batch.epoch,
        }
        if peak_flops is not None:
            metrics["mfu"] = target_tokens * flops_per_token / step_time / peak_flops
        if validation and _validates(progress.step, train):
            metrics["val_loss"] = validation_loss(stepper, validation)
        observer.on_step(progress, metrics)


def _validates(step: int, train: TrainConfig) -> bool:
    return step == train.steps or (train.validate_every is not None and step % train.validate_every == 0)


def validation_loss(stepper: Stepper, validation: Sequence[Batch]) -> float:
    """The mean loss of the validation batches' target tokens, in nats."""
    target_tokens = sum(int((batch.targets != IGNORE).sum()) for batch in validation)
    total = sum(stepper.evaluate(batch).item() for batch in validation)
    return total / target_tokens
