import math

import pytest
import torch

from trainwright.models.counter_random import key_of, mix, normal, random_bits

# Everything here is a fixed number, so the bounds are those of chance: six standard deviations.
KEY = key_of(0, "layers.0.mlp.up_proj.weight")


def bits(key: int = KEY, rows: int = 512, columns: int = 512) -> torch.Tensor:
    return random_bits(key, torch.arange(rows), torch.arange(columns))


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """(n, 32) zeros and ones."""
    return (words.flatten().unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1


@pytest.mark.parametrize("key", [KEY, key_of(1, "layers.0.mlp.up_proj.weight"), 0, -1])
@pytest.mark.parametrize("shape", [(512, 512), (1, 1 << 18), (1 << 18, 1)])
def test_each_byte_is_uniform(key, shape):
    words = bits(key, *shape).flatten()
    for byte in range(4):
        counts = torch.bincount((words >> (8 * byte)) & 255, minlength=256).double()
        mean = len(words) / 256
        chi_square = ((counts - mean) ** 2 / mean).sum().item()
        assert abs(chi_square - 255) < 6 * math.sqrt(2 * 255), (byte, chi_square)


def test_each_bit_of_the_counters_turns_half_of_the_bits():
    """The avalanche criterion, for the key's bits, the row's and the column's."""
    rows, columns = torch.arange(1024, dtype=torch.int32), torch.arange(64, dtype=torch.int32)
    base = random_bits(KEY, rows, columns)
    bound = 6 * 0.5 / math.sqrt(base.numel())
    for bit in range(31):
        flip = 1 << bit
        others = {
            "key": random_bits(KEY ^ flip, rows, columns),
            "row": random_bits(KEY, rows ^ flip, columns),
            "column": random_bits(KEY, rows, columns ^ flip),
        }
        for name, other in others.items():
            turned = unpacked(base ^ other).double().mean(0)
            assert (turned - 0.5).abs().max() < bound, (name, bit, turned)


@pytest.mark.parametrize("difference", [1, 5, 256])
def test_another_key_gives_other_rows_in_whatever_order(difference):
    rows = [set(map(tuple, bits(key, 512, 4).tolist())) for key in (KEY, KEY ^ difference, KEY + difference)]
    assert [len(each) for each in rows] == [512] * 3
    assert not rows[0] & (rows[1] | rows[2])


def test_neighbours_are_independent():
    draws = normal(KEY, torch.arange(512), torch.arange(512)).double()
    pairs = {
        "next row": (draws[:-1], draws[1:]),
        "next column": (draws[:, :-1], draws[:, 1:]),
        "diagonal": (draws[:-1, :-1], draws[1:, 1:]),
        "transposed": (draws, draws.T),
        "next key": (draws, normal(KEY + 1, torch.arange(512), torch.arange(512)).double()),
        "next seed": (draws, normal(key_of(1, "x"), torch.arange(512), torch.arange(512)).double()),
    }
    for name, (one, other) in pairs.items():
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1].item()
        # The transposed matrix has each pair twice.
        assert abs(correlation) < 6 * math.sqrt(2) / math.sqrt(one.numel()), (name, correlation)


def test_rows_and_columns_are_no_sums():
    """No rank-one structure: the largest singular value is that of noise (twice the root of the size)."""
    draws = normal(KEY, torch.arange(512), torch.arange(512))
    assert torch.linalg.matrix_norm(draws, 2) < 2.1 * math.sqrt(512)


def test_normal_draws_are_normal():
    draws = normal(KEY, torch.arange(1024), torch.arange(1024)).double().flatten()
    n = len(draws)
    assert abs(draws.mean()) < 6 / math.sqrt(n)
    assert abs(draws.std() - 1) < 6 / math.sqrt(2 * n)
    standard = (draws - draws.mean()) / draws.std()
    assert abs((standard**3).mean()) < 6 * math.sqrt(6 / n)
    assert abs((standard**4).mean() - 3) < 6 * math.sqrt(24 / n)
    # Kolmogorov and Smirnov's distance to the normal distribution, at a level below 1e-9.
    ordered = draws.sort().values
    expected = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    distance = (expected - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert distance < 3.3 / math.sqrt(n)
    assert 4.5 < draws.abs().max() < 5.4


def test_any_block_can_be_drawn_alone():
    whole = normal(KEY, torch.arange(100), torch.arange(70))
    rows, columns = torch.tensor([3, 99, 5]), torch.arange(20, 33)
    assert torch.equal(normal(KEY, rows, columns), whole[rows][:, columns])


def test_mix_is_a_bijection_of_the_low_bits_and_the_signs():
    words = torch.cat((torch.arange(1 << 16), torch.arange(-(1 << 16), 0))).to(torch.int32)
    assert len(mix(words).unique()) == len(words)
    # Wellons' own constants in unbounded integers.
    for word in (1, 2, 0x7FFFFFFF, 0x80000000, 0xDEADBEEF):
        x = word
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        x ^= x >> 16
        signed = torch.tensor([word - (1 << 32) if word >> 31 else word], dtype=torch.int32)
        assert mix(signed).item() & 0xFFFFFFFF == x


def test_keys_keep_their_parts_apart():
    keys = [key_of(*parts) for parts in ((1, "ab"), ("1a", "b"), (1, "a", "b"), (11, "ab"), (1, "ab", ""))]
    assert len(set(keys)) == len(keys)
    assert key_of(1, "ab") == key_of("1", "ab")  # a seed from a recipe or from a file
    assert all(-(1 << 31) <= key < 1 << 31 for key in keys)
