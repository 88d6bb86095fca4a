"""Random numbers as a function of (key, row, column): no generator, no state.

Every element can be drawn alone, so a shard of a tensor holds the numbers that the whole one would.
All arithmetic is on 32-bit integers with wrap-around, which every device has.
"""

import hashlib

import torch
from torch import Tensor


def key_of(*parts: object) -> int:
    """A 32-bit key mixed on the host from `parts`, such as a seed and a parameter's name."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little", signed=True)


def _signed(constant: int) -> int:
    return constant - (1 << 32) if constant >= 1 << 31 else constant


def mix(x: Tensor) -> Tensor:
    """A bijective avalanche hash of int32 `x` ("lowbias32": xor-shift-multiply, Wellons 2018)."""
    x = x ^ _shift_right(x, 16)
    x = x * _signed(0x7FEB352D)
    x = x ^ _shift_right(x, 15)
    x = x * _signed(0x846CA68B)
    return x ^ _shift_right(x, 16)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int32's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def random_bits(key: int, rows: Tensor, columns: Tensor) -> Tensor:
    """32 random bits for each pair of `rows` (r,) and `columns` (c,), int32 numbers: (r, c) int32."""
    return mix(of_rows(key, rows).unsqueeze(1) ^ of_columns(columns).unsqueeze(0))


def of_rows(key: int, rows: Tensor) -> Tensor:
    """The rows' part of `random_bits`, (r,) int32."""
    # Mixed before the key comes in: else keys that differ in low bits would give the same rows, reordered.
    return mix(mix(rows.to(torch.int32)) ^ key)


def of_columns(columns: Tensor) -> Tensor:
    """The columns' part of `random_bits`, (c,) int32."""
    return mix(columns.to(torch.int32) + _signed(0x9E3779B9))


def normal(key: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard normal float32 draws, (r, c), by the inverse of the normal distribution function.

    23 random bits give an odd multiple of 2**-23 strictly between -1 and 1, so no draw is infinite and
    none is beyond 5.3 standard deviations.
    """
    bits = _shift_right(random_bits(key, rows, columns), 9)
    uniform = (bits * 2 + 1 - (1 << 23)).to(torch.float32) * 2.0**-23
    return torch.erfinv(uniform).mul_(2.0**0.5)
