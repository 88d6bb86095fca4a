import math

import pytest
import torch
from torch import Tensor

from trainwright.models.counter_random import random_bits
from trainwright.models.storage import Piece
from trainwright.trainers.rounding import (
    as_matrix,
    bits_of,
    halves_of,
    round_stochastically,
    rounding_key,
)

MILLION = 1 << 20
ALL_ONES, ZERO = (torch.tensor(integer, dtype=torch.int32) for integer in (-1, 0))


def bits(key: int = 0) -> Tensor:
    return random_bits(key, torch.arange(1024), torch.arange(1024)).flatten()


def patterns(integers: Tensor) -> Tensor:
    """float32 numbers from their bits."""
    return integers.to(torch.int32).view(torch.float32)


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers next to each value, towards zero and away from it, as float64."""
    inner = values.view(torch.int32) & ~0xFFFF
    return inner.view(torch.float32).double(), (inner + 0x10000).view(torch.float32).double()


def normal_values() -> Tensor:
    return torch.randn(MILLION, generator=torch.Generator().manual_seed(0))


def subnormal_values() -> Tensor:
    draw = torch.randint(1, 0x800000, (MILLION,), generator=torch.Generator().manual_seed(0))
    return patterns(draw | torch.where(draw % 2 == 0, 1 << 31, 0))


@pytest.mark.parametrize("values", [normal_values(), subnormal_values()], ids=["normal", "subnormal"])
def test_a_million_roundings_are_unbiased_and_each_is_a_neighbour(values: Tensor):
    inner, outer = neighbours(values)
    found = round_stochastically(values, bits()).double()
    assert bool(((found == inner) | (found == outer)).all())
    chance = (values.double() - inner) / (outer - inner)  # of the outer one
    assert chance.min() >= 0
    assert 0.45 < chance.mean() < 0.55
    error = ((found == outer).double() - chance).sum()
    assert abs(error) < 4 * (chance * (1 - chance)).sum().sqrt()


@pytest.mark.parametrize("sixteenths", range(16))
def test_one_value_goes_up_as_often_as_it_should(sixteenths: int):
    value = 1 + sixteenths / 16 / 128  # the spacing at 1 is 1 / 128
    found = round_stochastically(torch.full((MILLION,), value), bits(sixteenths))
    chance = sixteenths / 16
    up = int((found > 1).sum())
    assert abs(up - chance * MILLION) <= 4 * math.sqrt(chance * (1 - chance) * MILLION)


def test_what_bf16_can_hold_stays_as_it_is():
    everything = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = round_stochastically(everything.float(), ALL_ONES)
    number = ~everything.isnan()
    assert torch.equal(found[number].view(torch.int16), everything[number].view(torch.int16))
    assert bool(found[~number].isnan().all())
    assert found.isinf().sum() == 2


def test_every_nan_stays_one():
    payloads = patterns(torch.tensor([0x7F800001, 0x7F80FFFF, 0x7FFFFFFF, -1, -0x7FFFFF, 0x7FC00000]))
    assert bool(payloads.isnan().all())
    for drawn in (ALL_ONES, ZERO):
        assert bool(round_stochastically(payloads, drawn).isnan().all())


def test_above_the_largest_number_the_neighbour_is_infinity():
    largest = torch.finfo(torch.float32).max
    assert round_stochastically(torch.tensor(largest), ZERO) == torch.finfo(torch.bfloat16).max
    assert round_stochastically(torch.tensor(largest), ALL_ONES) == math.inf
    assert round_stochastically(torch.tensor(-largest), ALL_ONES) == -math.inf


def test_only_the_low_half_of_the_bits_counts():
    values, drawn = normal_values(), bits()
    assert torch.equal(round_stochastically(values, drawn), round_stochastically(values, drawn & 0xFFFF))
    other = round_stochastically(values, drawn >> 16)
    assert not torch.equal(round_stochastically(values, drawn), other)


def bits_at(piece: Piece, key: int = 7) -> Tensor:
    return bits_of(*halves_of(piece, key)).view(as_matrix(piece.values).shape)


def test_a_piece_draws_the_bits_of_the_whole():
    matrix, vector = torch.zeros(37, 21), torch.zeros(50)
    whole = bits_at(Piece(matrix))
    for row, column in ((0, 0), (5, 0), (0, 4), (11, 3)):
        part = matrix[row : row + 9, column : column + 10]
        assert torch.equal(bits_at(Piece(part, row, column)), whole[row : row + 9, column : column + 10])
    assert torch.equal(bits_at(Piece(vector[20:], 20)), bits_at(Piece(vector))[:, 20:])
    assert bits_at(Piece(matrix[:0], 37)).shape == (0, 21)


def test_keys_differ_by_seed_step_and_name():
    keys = {rounding_key(seed, step, name) for seed in (0, 1) for step in (1, 2) for name in ("a", "b")}
    assert len(keys) == 8
