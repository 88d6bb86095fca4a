"""What the optimizer updates, and in which dtype the model computes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainwright.trainers.parallel.shards import local, local_pieces


class Precision(NamedTuple):
    """A mode.

    computes_in: the dtype of the model's own matrix products. kept_in: that of the weights that are updated,
    and of the optimizer's moments. stochastic: an update is rounded to it by chance, not to nearest.
    """

    computes_in: torch.dtype
    kept_in: torch.dtype
    stochastic: bool = False


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "mixed": Precision(torch.bfloat16, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "bf16_sr": Precision(torch.bfloat16, torch.bfloat16, stochastic=True),
}

# In which dtype gradients travel and are summed over ranks, by the recipe's word.
REDUCES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Weights:
    """A model's weights as the optimizer sees them: its own parameters, in fp32.

    stored: by the parameters' names, as a checkpoint has them: DTensors where ranks share a parameter.
    local: this rank's parts of them, in the same memory. The optimizer updates these, so it is the same on
    any layout; their `.grad` is set by `collect`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.stored: dict[str, Tensor] = dict(model.named_parameters())
        self.local = {name: local(weight) for name, weight in self.stored.items()}

    def collect(self) -> None:
        """After the step's last backward: hand each part its gradient."""
        for name, part in self.local.items():
            gradient = self.stored[name].grad
            part.grad = None if gradient is None else local(gradient)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of each part that has one, its gradient."""
        return {name: part.grad for name, part in self.local.items() if part.grad is not None}

    def drop_gradients(self) -> None:
        """Free the gradients of the step."""
        for tensor in (*self.stored.values(), *self.local.values()):
            tensor.grad = None

    def publish(self) -> None:
        """Let the model compute with the values as they are now; after an update or a load."""


class MasterWeights(Weights):
    """fp32 weights kept beside a model that computes in bf16.

    Each bf16 gradient is added to its fp32 master's as soon as it is whole and then freed, so micro-batches
    accumulate in fp32 and the two sets of gradients are never both alive.
    """

    def __init__(self, model: nn.Module, computes_in: torch.dtype) -> None:
        self.stored = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
        self.local = {name: local(weight) for name, weight in self.stored.items()}
        _round_parameters(model, computes_in)
        self._computed = [local(parameter) for parameter in model.parameters()]
        for master, parameter in zip(self.local.values(), model.parameters(), strict=True):
            parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))

    def collect(self) -> None:
        """The gradients came as they were made."""

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's own weights."""
        torch._foreach_copy_(self._computed, list(self.local.values()))


def _round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give `model` parameters of `dtype` instead of its own; tied ones stay tied.

    New ones: what a DTensor has inside keeps its dtype where only its `data` is set.
    """
    rounded = {id(one): nn.Parameter(one.detach().to(dtype), one.requires_grad) for one in model.parameters()}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module.register_parameter(key, rounded[id(parameter)])


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad += gradient
        parameter.grad = None

    return hook


class Bf16Weights(Weights):
    """A model's own parameters in bf16, without masters.

    A step's only gradient stays in bf16 as it came; those of several micro-batches are added up in fp32. They
    come by a hook, which FSDP calls too, for each gradient that it has reduced to shards.

    pieces: the parts in `local`, with where in the whole they start.
    """

    def __init__(self, model: nn.Module) -> None:
        self.stored = dict(model.named_parameters())
        assert all(weight.dtype == torch.bfloat16 for weight in self.stored.values())
        self.pieces = local_pieces(model)
        self.local = {name: piece.values for name, piece in self.pieces.items()}
        self._gradients: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._take(name))

    def _take(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient, before = local(parameter.grad), self._gradients.get(name)
            self._gradients[name] = gradient if before is None else before.float().add_(gradient)
            parameter.grad = None

        return hook

    def collect(self) -> None:
        """The gradients came as they were made."""

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of each part that has one, its gradient, in bf16 or fp32."""
        return self._gradients

    def drop_gradients(self) -> None:
        """Free the gradients of the step."""
        self._gradients.clear()


def weights_of(model: nn.Module, precision: Precision, keeps_masters: bool) -> Weights:
    """For the optimizer. keeps_masters: the model's own parameters are fp32 masters already."""
    if precision.kept_in == torch.bfloat16:
        return Bf16Weights(model)
    if precision.computes_in == torch.float32 or keeps_masters:
        return Weights(model)
    return MasterWeights(model, precision.computes_in)
