"""The gated activation of Llama's feed-forward: silu(gate) * up (Shazeer, arXiv 2002.05202)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Swiglu(torch.autograd.Function):
    """Keeps only its input and writes both gradients where the coalesced matrix wants them.

    Autograd's own version of the same maths keeps two more activations and copies each gradient twice.
    """

    @staticmethod
    def forward(gate_up: Tensor, block: int) -> Tensor:
        gate, up = gate_up.unflatten(-1, (-1, 2, block)).unbind(-2)
        # Exponentials go over contiguous copies: kernels do a block's odd end one element at a time.
        activated: Tensor = F.silu(gate.contiguous(), inplace=True).mul_(up).flatten(-2)
        return activated

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        gate_up, ctx.block = inputs
        ctx.save_for_backward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.unflatten(-1, (-1, 2, ctx.block)).unbind(-2)
        grad = grads[0].unflatten(-1, (-1, ctx.block))
        both = torch.empty_like(gate_up)
        grad_gate, grad_up = both.unflatten(-1, (-1, 2, ctx.block)).unbind(-2)
        gate = gate.contiguous()
        activated = F.silu(gate)
        torch.mul(grad, activated, out=grad_up)
        scratch = torch.mul(grad, up, out=activated)
        grad_gate.copy_(torch.ops.aten.silu_backward(scratch, gate))
        return both, None


def coalesced_swiglu(gate_up: Tensor, block: int) -> Tensor:
    """silu(gate) * up of `gate_up` (..., 2 n), stored as (n / block, 2, block): (..., n)."""
    if torch.compiler.is_compiling():  # the compiler can't write into parts of a tensor, and needs no help
        gate, up = gate_up.unflatten(-1, (-1, 2, block)).unbind(-2)
        activated: Tensor = (F.silu(gate) * up).flatten(-2)
    else:
        activated = _Swiglu.apply(gate_up, block)  # type: ignore[no-untyped-call]
    return activated
