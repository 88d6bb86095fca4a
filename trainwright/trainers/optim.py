"""The optimizer: AdamW (Loshchilov & Hutter, arXiv 1711.05101) over named weights, by what they are kept in."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from trainwright.configs.schema import OptimConfig, Recipe
from trainwright.models.storage import Piece
from trainwright.trainers.bf16_adamw import Bf16AdamW, weight_decay
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.precision import PRECISIONS, Bf16Weights, Weights


class Optimizer(Protocol):
    """Updates this rank's part of the weights.

    state: by the part, its `exp_avg`, `exp_avg_sq` and `step`, in place from the start so that a checkpoint can
    load into them.
    """

    state: Any

    def update(self, gradients: Mapping[str, Tensor], lr: float, scale: Tensor | None) -> None:
        """Take a step; gradients by name, each divided by `scale`, a scalar on the device, as it is read."""


class FusedAdamW(torch.optim.AdamW):
    """PyTorch's fused AdamW; implements `Optimizer`.

    weights: this rank's parts, by name; a part may be empty.
    """

    def __init__(self, weights: Mapping[str, Tensor], optim: OptimConfig) -> None:
        by_decay: dict[float, list[Tensor]] = {}
        for weight in weights.values():
            by_decay.setdefault(weight_decay(weight, optim), []).append(weight)
        super().__init__(
            [{"params": params, "weight_decay": decay} for decay, params in by_decay.items()],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )
        self.weights = weights
        for weight in weights.values():
            self.state[weight] = {
                "step": torch.zeros((), dtype=torch.float32, device=weight.device),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def update(self, gradients: Mapping[str, Tensor], lr: float, scale: Tensor | None) -> None:
        """See `Optimizer`."""
        for name, weight in self.weights.items():
            weight.grad = gradients.get(name)
        # The fused kernel divides by it as it reads the gradients: clipping takes no pass of its own.
        setattr(self, "grad_scale", scale)  # noqa: B010
        for group in self.param_groups:
            group["lr"] = lr
        self.step()


def build_optimizer(weights: Weights, recipe: Recipe, platform: Platform) -> Optimizer:
    """AdamW for `weights` as the recipe has it and the platform can do it."""
    precision = recipe.precision
    stochastic = PRECISIONS[precision.mode].stochastic and precision.rounding == "optimizer"
    if isinstance(weights, Bf16Weights):
        pieces = weights.pieces
    elif platform.fuses_adamw:
        return FusedAdamW(weights.local, recipe.optim)
    else:
        pieces = {name: Piece(part) for name, part in weights.local.items()}
    return Bf16AdamW(pieces, recipe.optim, recipe.seed, platform, stochastic=stochastic)
