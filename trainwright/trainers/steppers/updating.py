"""The half of a step that comes after the backward, which steppers share: norms, update, state."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trainwright.configs.schema import Recipe
from trainwright.models.mixtral import Mixtral
from trainwright.trainers.optim import build_optimizer
from trainwright.trainers.parallel.apply import Layout
from trainwright.trainers.parallel.shards import counts_here, local, stored_like
from trainwright.trainers.parallel.stages import parts_of
from trainwright.trainers.precision import PRECISIONS, weights_of

ELEMENTS_AT_ONCE = 1 << 20  # of a low-precision tensor, that are float32 at a time


class Updating:
    """A rank's part of a model's weights and of their optimizer; see `Stepper` for its public methods."""

    def __init__(self, model: nn.Module, recipe: Recipe, layout: Layout, device: torch.device) -> None:
        self.weights = weights_of(model, PRECISIONS[recipe.precision.mode], layout.keeps_masters)
        self.optimizer = build_optimizer(self.weights, recipe, layout.platform)
        self.weights.publish()
        self.layout = layout
        self.device = device
        self._measuring = [part for part in parts_of(model) if isinstance(part, Mixtral)]
        self._counted = [name for name, weight in self.weights.stored.items() if counts_here(weight)]

    def collect_gradients(self) -> None:
        """After the step's last backward: hand each weight the sum of its gradient."""
        self.weights.collect()
        self.layout.sum_partial(self.weights.gradients)

    @torch.no_grad()
    def squares(self) -> Tensor:
        """See `Stepper`."""
        weights = [self.weights.local[name] for name in self._counted]
        found = self.weights.gradients
        gradients = [found[name] for name in self._counted if name in found]
        return torch.stack((sum_of_squares(gradients, self.device), sum_of_squares(weights, self.device)))

    def measured(self) -> dict[str, Tensor]:
        """See `Stepper`. Of tensor-parallel peers, which all have the same, one brings it in."""
        shares: dict[str, Tensor] = {}
        for part in self._measuring:
            for name, share in part.take_measured().items():
                shares[name] = shares.get(name, 0.0) + share * float(self.layout.ranks.tp_rank == 0)
        return shares

    @torch.no_grad()
    def update(self, lr: float, grad_norm: Tensor, clip: float | None, skip: bool = False) -> None:
        """See `Stepper`."""
        if not skip:
            # The optimizer divides by it as it reads the gradients: clipping takes no pass of its own.
            scale = None if clip is None else ((grad_norm + 1e-6) / clip).clamp(min=1.0)
            self.optimizer.update(self.weights.gradients, lr, scale)
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
    rows = [part for tensor in tensors for part in _row_norms(tensor)]
    return torch.stack(torch._foreach_norm(rows)).square().sum()


def _row_norms(tensor: Tensor) -> Iterator[Tensor]:
    """The norms of a matrix's rows, or a vector itself; float32. Of a wider copy, few rows at a time."""
    if tensor.dim() == 1:
        yield tensor.float()
    elif tensor.dtype == torch.float32:
        yield torch.linalg.vector_norm(tensor, dim=-1)
    else:
        for rows in tensor.flatten(0, -2).split(max(1, ELEMENTS_AT_ONCE // max(1, tensor.shape[-1]))):
            yield torch.linalg.vector_norm(rows.float(), dim=-1)
