"""Experts: as many feed-forwards side by side, each over the rows that are its own.

Shapes in comments: E experts, M rows (sorted by expert), D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.configs.schema import ModelConfig
from trainwright.models.storage import gate_up_block
from trainwright.models.swiglu import coalesced_swiglu


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor | None) -> Tensor:
    """The product of each expert's rows of x (M, inputs) with its matrix of (E, outputs, inputs): (M, outputs).

    counts: (E,) int64, how many rows each has in turn; None: equally many.
    """
    if counts is None:
        return torch.bmm(x.unflatten(0, (len(weight), -1)), weight.mT).flatten(0, 1)
    product: Tensor = _multiply(x, weight, counts)
    return product


# Operators of their own: `torch.compile` can't know how many rows an expert will have.
@torch.library.custom_op("trainwright::grouped_linear", mutates_args=())
def _multiply(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A product for each expert, into its part of the result: large ones, which a loop doesn't slow down."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    sizes = counts.tolist()
    for rows, matrix, into in zip(x.split(sizes), weight, out.split(sizes), strict=True):
        torch.mm(rows, matrix.T, out=into)
    return out


@_multiply.register_kernel("cuda")
def _multiply_grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One kernel for all, which asks nothing of the host."""
    return torch._grouped_mm(x, weight.mT, offs=_ends(counts))


@_multiply.register_fake
def _multiply_shapes(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("trainwright::grouped_linear_backward", mutates_args=())
def _multiply_backward(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight."""
    grad_x, grad_weight = _multiply_backward_shapes(grad, x, weight, counts)
    sizes = counts.tolist()
    of_rows = zip(grad.split(sizes), x.split(sizes), grad_x.split(sizes), strict=True)
    for (gradient, rows, into), matrix, own in zip(of_rows, weight, grad_weight, strict=True):
        torch.mm(gradient, matrix, out=into)
        torch.mm(gradient.T, rows, out=own)
    return grad_x, grad_weight


@_multiply_backward.register_kernel("cuda")
def _multiply_backward_grouped(
    grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    ends = _ends(counts)
    return torch._grouped_mm(grad, weight, offs=ends), torch._grouped_mm(grad.T, x, offs=ends)


@_multiply_backward.register_fake
def _multiply_backward_shapes(grad: Tensor, x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _ends(counts: Tensor) -> Tensor:
    """Where each expert's rows end, as PyTorch's grouped product wants it."""
    return counts.cumsum(0).to(torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_multiply_backward(grad.contiguous(), *ctx.saved_tensors), None


_multiply.register_autograd(_backward, setup_context=_setup_context)


class GroupedLinear(nn.Module):
    """A bias-free projection of each expert; its values come from `init_weights`."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, x: Tensor, counts: Tensor | None) -> Tensor:
        """(M, inputs) to (M, outputs); see `grouped_linear`."""
        return grouped_linear(x, self.weight, counts)


class Experts(nn.Module):
    """E SwiGLUs: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe.num_local_experts is not None
        experts, width, inner = config.moe.num_local_experts, config.hidden_size, config.intermediate_size
        self.coalesce = config.coalesce
        self.block = gate_up_block(inner)
        if config.coalesce:
            self.gate_up_proj = GroupedLinear(experts, width, 2 * inner)
        else:
            self.gate_proj = GroupedLinear(experts, width, inner)
            self.up_proj = GroupedLinear(experts, width, inner)
        self.down_proj = GroupedLinear(experts, inner, width)

    def forward(self, rows: Tensor, counts: Tensor | None) -> Tensor:
        """(M, D) to (M, D); counts: as in `grouped_linear`."""
        if self.coalesce:
            activated = coalesced_swiglu(self.gate_up_proj(rows, counts), self.block)
        else:
            activated = F.silu(self.gate_proj(rows, counts)) * self.up_proj(rows, counts)
        made: Tensor = self.down_proj(activated, counts)
        return made
