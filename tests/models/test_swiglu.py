import pytest
import torch
import torch.nn.functional as F

from trainwright.configs.schema import ModelConfig
from trainwright.models.storage import gate_up_rows
from trainwright.models.swiglu import coalesced_swiglu


def plain(gate_up: torch.Tensor, block: int) -> torch.Tensor:
    """The same by hand: block after block of gate, then of up."""
    parts = gate_up.split(block, dim=-1)
    gate, up = torch.cat(parts[::2], -1), torch.cat(parts[1::2], -1)
    return gate * torch.sigmoid(gate) * up


@pytest.fixture(params=[1, 3, 12])
def block(request) -> int:
    return request.param


@pytest.fixture
def gate_up() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 24, generator=generator, dtype=torch.float64).requires_grad_()


def test_value_and_gradient(gate_up, block):
    ours, theirs = coalesced_swiglu(gate_up, block), plain(gate_up, block)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(ours)
    (grad,) = torch.autograd.grad(ours, gate_up, direction)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, gate_up, direction)[0], rtol=1e-12, atol=1e-12)


def test_gradcheck(gate_up, block):
    assert torch.autograd.gradcheck(lambda x: coalesced_swiglu(x, block), gate_up)


def test_a_gradient_of_any_strides(gate_up, block):
    """What comes from the next layer's backward may be a transposed or expanded view."""
    weights = torch.randn(12, 3, 2, dtype=torch.float64)
    (ours,) = torch.autograd.grad((coalesced_swiglu(gate_up, block) * weights.permute(2, 1, 0)).sum(), gate_up)
    (theirs,) = torch.autograd.grad((plain(gate_up, block) * weights.permute(2, 1, 0)).sum(), gate_up)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (ours,) = torch.autograd.grad(coalesced_swiglu(gate_up, block).sum(), gate_up)
    (theirs,) = torch.autograd.grad(plain(gate_up, block).sum(), gate_up)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_blocks_are_those_of_storage():
    config = ModelConfig(intermediate_size=512)
    gate, up = torch.randn(2, 4, 512, dtype=torch.float64)
    stored = torch.empty(4, 1024, dtype=torch.float64)
    for rows, values in zip(gate_up_rows(config), (gate, up), strict=True):
        stored[:, rows] = values
    torch.testing.assert_close(coalesced_swiglu(stored, 128), F.silu(gate) * up, rtol=1e-12, atol=1e-12)
