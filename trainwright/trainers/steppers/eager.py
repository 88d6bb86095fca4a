"""The stepper of plain PyTorch: micro-batches one after another, their gradients added up."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainwright.configs.schema import Recipe
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.optim import build_adamw
from trainwright.trainers.precision import WEIGHTS

Loss = Callable[[nn.Module, Batch], Tensor]


class EagerStepper:
    """One process's forward, backward and update; implements `Stepper`.

    loss: (model, micro-batch) to the sum of its target tokens' losses, the task's part of a step.
    """

    def __init__(self, model: nn.Module, loss: Loss, recipe: Recipe, device: torch.device) -> None:
        self.weights = WEIGHTS[recipe.precision.mode](model)
        self.optimizer = build_adamw(self.weights.by_name, recipe.optim)
        self.weights.publish()
        self.model = cast(nn.Module, torch.compile(model)) if recipe.train.compile else model
        self.loss = loss
        self.micro_batch_size = recipe.train.micro_batch_size
        self.device = device
        self._norm: Tensor | None = None

    def forward_backward(self, batch: Batch, target_tokens: int) -> Tensor:
        """See `Stepper`."""
        self._norm = None
        total = torch.zeros((), device=self.device)
        for micro_batch in self._micro_batches(batch):
            loss = self.loss(self.model, micro_batch)
            (loss / target_tokens).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See `Stepper`."""
        total = torch.zeros((), device=self.device)
        for micro_batch in self._micro_batches(batch):
            total += self.loss(self.model, micro_batch)
        return total

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        for start in range(0, len(batch.tokens), self.micro_batch_size):
            yield batch.sequences(start, start + self.micro_batch_size).to(self.device)

    def grad_norm(self) -> Tensor:
        """See `Stepper`."""
        gradients = [w.grad for w in self.weights.by_name.values() if w.grad is not None]
        self._norm = _total_norm(gradients)
        return self._norm

    def param_norm(self) -> Tensor:
        """See `Stepper`."""
        return _total_norm([w.detach() for w in self.weights.by_name.values()])

    @torch.no_grad()
    def update(self, lr: float, clip: float | None, skip: bool = False) -> None:
        """See `Stepper`."""
        if not skip:
            scale = None
            if clip is not None:
                norm = self.grad_norm() if self._norm is None else self._norm
                # The fused kernel divides by it as it reads the gradients: clipping takes no pass of its own.
                scale = ((norm + 1e-6) / clip).clamp(min=1.0)
            setattr(self.optimizer, "grad_scale", scale)  # noqa: B010
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.weights.publish()
        for weight in self.weights.by_name.values():
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper`."""
        weights = self.weights.by_name
        return {
            "model": {name: weight.detach() for name, weight in weights.items()},
            "optimizer": {name: self.optimizer.state[weight] for name, weight in weights.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Stepper`."""
        for name, weight in self.weights.by_name.items():
            weight.copy_(state["model"][name])
            for key, tensor in self.optimizer.state[weight].items():
                tensor.copy_(state["optimizer"][name][key])
        self.weights.publish()


def _total_norm(tensors: list[Tensor]) -> Tensor:
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms.square().sum().sqrt()
