"""What the device would compile: an operator again for other shapes, dtypes, or numbers in its arguments."""

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

compiled: set[Hashable] = set()

# Numbers that are operands go in as data, by TorchNeuron's kernels; any others are part of the program.
OPERANDS = {"other", "self"}


def note(func: Any, asked: dict[str, Any]) -> None:
    """Take down that an operator runs; a view of a tensor is none."""
    if not func.is_view:
        compiled.add((str(func), *((name, _key(name, value)) for name, value in asked.items())))


def _key(name: str, value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(_key(name, one) for one in value)
    if isinstance(value, int | float) and name in OPERANDS:
        return type(value)
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # which is equal to no other
    if isinstance(value, int | float | str | torch.dtype | torch.device | None):
        return value
    return type(value)
