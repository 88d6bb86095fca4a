"""The learning rate of each step."""

import math

from trainwright.configs.schema import OptimConfig


def learning_rate(optim: OptimConfig, total_steps: int | None, step: int) -> float:
    """The rate for the update that ends step `step`, counted from 1.

    Linear from 0 to `lr` over `warmup_steps`, `lr` for `constant_steps`, then cosine or linear down to
    `min_lr`, reached at `decay_steps` (the last step unless given) and kept after it.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    start = optim.warmup_steps + optim.constant_steps
    end = optim.decay_steps or total_steps
    if optim.schedule == "constant" or step <= start or end is None:
        return optim.lr
    done = min(1.0, (step - start) / max(1, end - start))
    share = 1 - done if optim.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * share
