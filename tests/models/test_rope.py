import math

import pytest
import torch

from trainwright.configs.schema import ModelConfig, RopeScaling
from trainwright.models.rope import inverse_frequencies, rope_tables, rotate


def plain(x: torch.Tensor, inverse: torch.Tensor, start: int) -> torch.Tensor:
    """The paper's formula: the pair (i, i + half) is a complex number turned by position * angle."""
    half = x.shape[-1] // 2
    positions = torch.arange(start, start + x.shape[-2], dtype=x.dtype)
    turn = torch.polar(torch.ones(()).to(x.dtype), torch.outer(positions, inverse.to(x.dtype)))
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64).requires_grad_()


INVERSE = inverse_frequencies(ModelConfig(head_dim=8, rope_theta=100.0))


def tables(start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_tables(INVERSE.double(), start, length, torch.float64)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` of (batch, heads, length, head_dim)."""
    return rotate(x.movedim(1, 2).unsqueeze(2), cos, sin).squeeze(2).movedim(1, 2)


@pytest.mark.parametrize("start", [0, 11])
def test_value_and_gradient(x, start):
    ours, theirs = turned(x, *tables(start, 7)), plain(x, INVERSE, start)
    # The tables' positions are float32, exact here, so the angles are good to float32 or better.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(x)
    (grad,) = torch.autograd.grad(ours, x, direction)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs, x, direction)[0], rtol=1e-6, atol=1e-6)


def test_gradcheck(x):
    cos, sin = tables(3, 7)
    assert torch.autograd.gradcheck(lambda x: turned(x, cos, sin), x)


def test_products_depend_on_differences_of_positions_only(x):
    q, k = x.detach()[:1], x.detach()[1:]
    products = [turned(q, *tables(start, 7)) @ turned(k, *tables(start, 7)).mT for start in (0, 1, 500)]
    torch.testing.assert_close(products[1], products[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(products[2], products[0], rtol=1e-4, atol=1e-4)


def test_tables_go_on_where_they_stopped():
    whole = rope_tables(INVERSE, 0, 20, torch.float32)
    for table, first, second in zip(
        whole,
        rope_tables(INVERSE, 0, 12, torch.float32),
        rope_tables(INVERSE, 12, 8, torch.float32),
        strict=True,
    ):
        assert torch.equal(table, torch.cat((first, second)))


def test_low_precision_tables_are_made_in_float32():
    """Positions above 256 are not numbers of bfloat16."""
    low = rope_tables(INVERSE, 5000, 8, torch.bfloat16)
    high = rope_tables(INVERSE, 5000, 8, torch.float32)
    for one, other in zip(low, high, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other.bfloat16())


def test_frequencies_without_scaling():
    frequencies = inverse_frequencies(ModelConfig(hidden_size=64, num_attention_heads=4, rope_theta=5e5))
    expected = [5e5 ** (-2 * pair / 16) for pair in range(8)]
    torch.testing.assert_close(frequencies, torch.tensor(expected), rtol=1e-6, atol=0)


def test_llama3_scaling_in_its_three_bands():
    """Llama 3.1's own numbers: wavelengths below 2048 stay, above 8192 are 8 times as long."""
    config = ModelConfig(head_dim=128, rope_theta=500000.0, rope_scaling=RopeScaling(factor=8.0))
    seen = {"kept": 0, "scaled": 0, "blended": 0}
    for pair, frequency in enumerate(inverse_frequencies(config).tolist()):
        base = 500000.0 ** (-2 * pair / 128)
        wavelength = 2 * math.pi / base
        if wavelength < 8192 / 4:
            band, expected = "kept", base
        elif wavelength > 8192 / 1:
            band, expected = "scaled", base / 8
        else:
            band = "blended"
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * base / 8 + smooth * base
        seen[band] += 1
        assert frequency == pytest.approx(expected, rel=2e-6)
    assert all(seen.values()), seen
