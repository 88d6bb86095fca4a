"""The stepper of plain PyTorch: micro-batches one after another, their gradients added up."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.configs.schema import Recipe
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.optim import build_adamw
from trainwright.trainers.parallel.apply import Layout
from trainwright.trainers.parallel.shards import counts_here, local, stored_like
from trainwright.trainers.precision import PRECISIONS, MasterWeights, Weights

Loss = Callable[[nn.Module, Batch], Tensor]


class EagerStepper:
    """One rank's forward, backward and update; implements `Stepper`.

    loss: (model, micro-batch) to the sum of its target tokens' losses, the task's part of a step.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, recipe: Recipe, layout: Layout, device: torch.device
    ) -> None:
        computes_in = PRECISIONS[recipe.precision.mode].computes_in
        if computes_in == torch.float32 or layout.keeps_masters:
            self.weights = Weights(model)
        else:
            self.weights = MasterWeights(model, computes_in)
        self.optimizer = build_adamw(self.weights.local, recipe.optim)
        self.weights.publish()
        self.model = model
        self.loss = loss
        self.layout = layout
        self.micro_batch_size = recipe.train.micro_batch_size
        self.device = device
        self._counted = [name for name, weight in self.weights.stored.items() if counts_here(weight)]

    def forward_backward(self, batch: Batch, target_tokens: int) -> Tensor:
        """See `Stepper`."""
        total = torch.zeros((), device=self.device)
        micro_batches = self._micro_batches(batch)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.layout.before_backward(self.model, last=number == len(micro_batches))
            loss = self.loss(self.model, micro_batch.to(self.device))
            (loss / target_tokens).backward()
            total += loss.detach()
        self.weights.collect()
        self.layout.sum_partial({name: w.grad for name, w in self.weights.local.items() if w.grad is not None})
        return self._share(total)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See `Stepper`."""
        total = torch.zeros((), device=self.device)
        for micro_batch in self._micro_batches(batch):
            total += self.loss(self.model, micro_batch.to(self.device))
        return self._share(total)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self.micro_batch_size
        return [batch.sequences(start, start + size) for start in range(0, len(batch.tokens), size)]

    def _share(self, loss: Tensor) -> Tensor:
        """Tensor-parallel peers all have the loss of their sequences: one of them brings it in."""
        return loss if self.layout.ranks.tp_rank == 0 else torch.zeros_like(loss)

    @torch.no_grad()
    def squares(self) -> Tensor:
        """See `Stepper`."""
        weights = [self.weights.local[name] for name in self._counted]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        return torch.stack((_sum_of_squares(gradients, self.device), _sum_of_squares(weights, self.device)))

    @torch.no_grad()
    def update(self, lr: float, grad_norm: Tensor, clip: float | None, skip: bool = False) -> None:
        """See `Stepper`."""
        if not skip:
            # The fused kernel divides by it as it reads the gradients: clipping takes no pass of its own.
            scale = None if clip is None else ((grad_norm + 1e-6) / clip).clamp(min=1.0)
            setattr(self.optimizer, "grad_scale", scale)  # noqa: B010
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.weights.publish()
        self.weights.drop_gradients()

    def state_dict(self) -> dict[str, Any]:
        """See `Stepper`."""
        return {
            "model": {name: weight.detach() for name, weight in self.weights.stored.items()},
            "optimizer": {name: self._moments(name) for name in self.weights.stored},
        }

    def _moments(self, name: str) -> dict[str, Tensor]:
        stored, part = self.weights.stored[name], self.weights.local[name]
        return {
            key: stored_like(value, stored) if value.dim() else value
            for key, value in self.optimizer.state[part].items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Stepper`."""
        for name, part in self.weights.local.items():
            part.copy_(local(state["model"][name]))
            for key, value in self.optimizer.state[part].items():
                value.copy_(local(state["optimizer"][name][key]))
        self.weights.publish()


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Over a list that may be empty, a float32 scalar."""
    if not tensors:
        return torch.zeros((), device=device)
    # Row by row: over a whole tensor the CPU's norm adds up one by one in float32, 1 % off at 128 M elements.
    rows = [torch.linalg.vector_norm(tensor, dim=-1) if tensor.dim() > 1 else tensor for tensor in tensors]
    return torch.stack(torch._foreach_norm(rows)).square().sum()
