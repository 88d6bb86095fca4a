"""Rotary position embeddings (Su et al., arXiv 2104.09864) in Transformers' half-split layout."""

import math
from typing import Any

import torch
from torch import Tensor

from trainwright.configs.schema import ModelConfig, RopeScaling
from trainwright.models.storage import head_dim


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """The angle per position of each pair of dims, (head_dim / 2,) float32, Llama 3.1's scaling included."""
    dim = head_dim(config)
    # On the CPU wherever the model is built: the same on every device, and there under a meta device.
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_theta ** (pairs / dim)
    scaling = config.rope_scaling
    return frequencies if scaling.factor == 1.0 else _llama3(frequencies, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow angles are divided by `factor`, fast ones kept, those between blended (Llama 3.1, appendix)."""
    wavelength = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rope_tables(inverse: Tensor, start: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of positions start..start+length-1, each (length, 1, 1, head_dim) in `dtype`.

    The sine's first half is negated, so that a rotation is `x * cos + roll(x, half) * sin`.
    """
    positions = torch.arange(start, start + length, device=inverse.device, dtype=torch.float32)
    angles = torch.outer(positions, inverse)
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


class _Rotate(torch.autograd.Function):
    """A rotation's derivative is the rotation back; nothing but the tables is kept for it."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        cos, sin = ctx.saved_tensors
        rotated = torch.addcmul(grad * cos, grad.roll(grad.shape[-1] // 2, -1), sin, value=-1)
        return rotated, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (batch, length, groups, heads, head_dim) rotated by the tables of `rope_tables`."""
    rotated: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated
