import pytest
import torch
from torch import nn

from trainwright.models.norm import RmsNorm


def pair(dtype: torch.dtype) -> tuple[RmsNorm, nn.RMSNorm, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RmsNorm(24, 1e-3), nn.RMSNorm(24, 1e-3)
    with torch.no_grad():
        ours.weight.normal_(generator=generator)
        theirs.weight.copy_(ours.weight)
    x, grad = torch.randn(2, 2, 5, 24, generator=generator).mul(3).to(dtype).unbind(0)
    return ours.to(dtype), theirs.to(dtype), x, grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_value_and_gradients_are_those_of_pytorch(dtype: torch.dtype, tolerance: float):
    ours, theirs, x, grad = pair(dtype)
    results = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        out.backward(grad)
        results.append((out, leaf.grad, norm.weight.grad))
    for one, other in zip(*results, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_row_of_zeros_stays_finite():
    ours, _, x, _ = pair(torch.float32)
    zeros = torch.zeros_like(x).requires_grad_()
    ours(zeros).sum().backward()
    assert zeros.grad is not None
    assert bool(zeros.grad.isfinite().all())
