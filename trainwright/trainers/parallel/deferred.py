"""Weights' gradients put off to where a pipeline's schedule has time for them (zero bubble, arXiv 2401.10241).

A backward pass then makes the gradients of activations, which the stage before waits for, and those of the
small weights; the products for the large ones wait. PyTorch's own way is to go through the graph twice, where
our own functions would make both kinds of gradients both times.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.models.llama import Head, Linear


class _Product(NamedTuple):
    """A weight's gradient: grad.T @ x. weight: as the forward pass had it, with its graph."""

    weight: Tensor
    x: Tensor
    grad: Tensor


class Deferred:
    """The products of one stage's weights that wait, of one micro-batch."""

    def __init__(self, model: nn.Module) -> None:
        self._waiting: list[_Product] = []
        for module in model.modules():
            # The head has the gradients of its weight as soon as it has the loss.
            if isinstance(module, Linear) and not isinstance(module, Head):
                module.multiply = self._multiply

    def take(self) -> Callable[[], None]:
        """What the last backward pass has put off, to be called once."""
        waiting, self._waiting = self._waiting, []
        return partial(_make, waiting)

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return F.linear(x, weight)

        def put_off(x: Tensor, grad: Tensor) -> None:
            self._waiting.append(_Product(weight, x, grad))

        # Detached, so that the backward pass ends here on the weight's side.
        product: Tensor = _Multiply.apply(x, weight.detach(), put_off)  # type: ignore[no-untyped-call]
        return product


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, put_off: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.put_off = put_off
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ctx.put_off(x, grads[0])
        return grads[0] @ weight, None, None


def _make(waiting: list[_Product]) -> None:
    """Add the gradients to those that the weights have, through their own graph and its hooks."""
    while waiting:
        weight, x, grad = waiting.pop()
        torch.autograd.backward(weight, grad.flatten(0, -2).T @ x.flatten(0, -2))
