"""Stochastic rounding of float32 to bfloat16: up or down by chance, so that the mean is what was rounded.

Rounded to nearest, an update below half the distance to the next bfloat16 is lost every time; by chance it
counts as often as it should (Gupta et al., arXiv 1502.02551). The chance is a hash of (key, row, column) in the
whole tensor, so the same update gives the same bits on any layout and after a restart.
"""

import torch
from torch import Tensor

from trainwright.models.counter_random import key_of, mix, of_columns, of_rows
from trainwright.models.storage import Piece

LOW = 0xFFFF  # the bits of a float32 that a bfloat16 lacks


def round_stochastically(values: Tensor, bits: Tensor) -> Tensor:
    """Float32 to bfloat16: one of the two neighbours of each value, the nearer one more often.

    bits: int32, random in the low 16. What a bfloat16 can hold stays as it is, infinities and NaNs too;
    above the largest finite one the neighbour is infinity.
    """
    # A float's bits count its magnitude, subnormals included: a carry out of the low ones is the next bfloat16.
    kept = (values.view(torch.int32) + (bits & LOW)) & ~LOW
    return torch.where(values == values, kept.view(torch.float32), values).to(torch.bfloat16)


def rounding_key(seed: int, step: int, name: str) -> int:
    """The key of a parameter's bits in an update, for `halves_of`."""
    return key_of(seed, "rounding", step, name)


def halves_of(piece: Piece, key: int) -> tuple[Tensor, Tensor]:
    """What `bits_of` takes of `as_matrix(piece.values)`: int32 of its rows, (r,), and of its columns, (c,).

    Of a stack each matrix has a key of its own.
    """
    device, shape = piece.values.device, piece.values.shape
    row, column = (0, piece.row) if len(shape) == 1 else (piece.row, piece.column)
    height = 1 if len(shape) == 1 else shape[-2]
    rows = torch.arange(row, row + height, dtype=torch.int32, device=device)
    columns = torch.arange(column, column + shape[-1], dtype=torch.int32, device=device)
    if len(shape) < 3:
        return of_rows(key, rows), of_columns(columns)
    keys = [key_of(key, piece.expert + number) for number in range(shape[0])]
    return torch.cat([of_rows(own, rows) for own in keys] or [rows[:0]]), of_columns(columns)


def bits_of(rows: Tensor, columns: Tensor) -> Tensor:
    """32 random bits for each element, (r, c) int32."""
    return mix(rows.unsqueeze(1) ^ columns.unsqueeze(0))


def as_matrix(tensor: Tensor) -> Tensor:
    """A view of a vector as one row, of a stack of matrices as one; of a matrix, itself."""
    assert tensor.dim() in (1, 2, 3)
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)
