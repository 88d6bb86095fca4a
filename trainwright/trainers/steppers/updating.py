"""The half of a step that comes after the backward, which steppers share: norms, update, state."""

from typing import Any

import torch
from torch import Tensor, nn

from trainwright.configs.schema import Recipe
from trainwright.trainers.optim import build_adamw
from trainwright.trainers.parallel.apply import Layout
from trainwright.trainers.parallel.shards import counts_here, local, stored_like
from trainwright.trainers.precision import PRECISIONS, MasterWeights, Weights


class Updating:
    """A rank's part of a model's weights and of their optimizer; see `Stepper` for its public methods."""

    def __init__(self, model: nn.Module, recipe: Recipe, layout: Layout, device: torch.device) -> None:
        computes_in = PRECISIONS[recipe.precision.mode].computes_in
        if computes_in == torch.float32 or layout.keeps_masters:
            self.weights = Weights(model)
        else:
            self.weights = MasterWeights(model, computes_in)
        self.optimizer = build_adamw(self.weights.local, recipe.optim)
        self.weights.publish()
        self.layout = layout
        self.device = device
        self._counted = [name for name, weight in self.weights.stored.items() if counts_here(weight)]

    def collect_gradients(self) -> None:
        """After the step's last backward: hand each weight the sum of its gradient."""
        self.weights.collect()
        self.layout.sum_partial({name: w.grad for name, w in self.weights.local.items() if w.grad is not None})

    @torch.no_grad()
    def squares(self) -> Tensor:
        """See `Stepper`."""
        weights = [self.weights.local[name] for name in self._counted]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        return torch.stack((sum_of_squares(gradients, self.device), sum_of_squares(weights, self.device)))

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


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Over a list that may be empty, a float32 scalar."""
    if not tensors:
        return torch.zeros((), device=device)
    # Row by row: over a whole tensor the CPU's norm adds up one by one in float32, 1 % off at 128 M elements.
    rows = [torch.linalg.vector_norm(tensor, dim=-1) if tensor.dim() > 1 else tensor for tensor in tensors]
    return torch.stack(torch._foreach_norm(rows)).square().sum()
