"""What the optimizer updates, and in which dtype the model computes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Weights:
    """A model's weights as the optimizer sees them: its own parameters, in fp32.

    by_name: the tensors to update, under the model's parameter names; their `.grad` is filled by backward.
    computes_in: the dtype of the model's own matrix products.
    """

    computes_in = torch.float32

    def __init__(self, model: nn.Module) -> None:
        self.by_name: dict[str, Tensor] = dict(model.named_parameters())

    def publish(self) -> None:
        """Let the model compute with the values as they are now; after an update or a load."""


class MasterWeights(Weights):
    """fp32 weights kept beside a model that computes in bf16.

    Each bf16 gradient is added to its fp32 master's as soon as it is whole and then freed, so micro-batches
    accumulate in fp32 and the two sets of gradients are never both alive.
    """

    computes_in = torch.bfloat16

    def __init__(self, model: nn.Module) -> None:
        self.by_name = {
            name: nn.Parameter(parameter.detach().float()) for name, parameter in model.named_parameters()
        }
        model.to(self.computes_in)
        self._computed: list[Tensor] = list(model.parameters())
        for master, parameter in zip(self.by_name.values(), self._computed, strict=True):
            parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's bf16 weights."""
        torch._foreach_copy_(self._computed, list(self.by_name.values()))


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return hook


WEIGHTS: dict[str, type[Weights]] = {"fp32": Weights, "mixed": MasterWeights}
