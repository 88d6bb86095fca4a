"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467)."""

from typing import Any

import torch
from torch import Tensor, nn


class _RmsNorm(torch.autograd.Function):
    """Keeps its input and one number a token; PyTorch's own version on a CPU takes twice the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        normalised: Tensor = (wide * scale).mul_(weight.float()).to(x.dtype)
        return normalised

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, wide_weight = grads[0].float(), weight.float()
        normalised = x.float() * scale
        # With y = w n and n = s x: dx = s (w dy - n mean(w dy n)), dw = the sum of dy n over the tokens.
        product = grad * normalised
        grad_weight = product.sum(tuple(range(x.dim() - 1)))
        mean = product.matmul(wide_weight).unsqueeze(-1) / x.shape[-1]
        grad_x = torch.addcmul(grad * wide_weight, normalised, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to (..., size)."""
        normalised: Tensor = _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normalised
