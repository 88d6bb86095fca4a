from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.trainers.data.order import Order
from trainwright.trainers.data.permutation import key_of, permute


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_every_number_comes_once(n, key):
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 2**31 + 1, 2**40 + 7])
def test_large_domains_stay_in_range_and_distinct(n):
    out = permute(np.arange(min(n, 5000)), n, 7)
    assert out.min() >= 0
    assert out.max() < n
    assert len(set(out.tolist())) == len(out)


def test_values_are_pinned():
    """A checkpoint of one version is resumed by the next, so the order is part of the format."""
    assert permute(np.arange(8), 8, 1).tolist() == [6, 2, 3, 4, 5, 7, 1, 0]


def test_order_depends_on_each_part_of_the_key():
    orders = {
        tuple(permute(np.arange(100), 100, key_of(*key)).tolist())
        for key in [(0, "data", 0), (1, "data", 0), (0, "other", 0), (0, "data", 1)]
    }
    assert len(orders) == 4


def test_it_mixes():
    """Neighbours go far apart and no position prefers a value: means and correlations near chance."""
    n = 4096
    out = permute(np.arange(n), n, 3)
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.05
    assert np.abs(np.diff(out)).mean() > n / 4
    firsts = [int(permute(np.arange(1), n, key_of(seed))[0]) for seed in range(400)]
    assert abs(np.mean(firsts) / n - 0.5) < 0.06
    assert len(set(firsts)) > 370


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum), epoch=st.integers(0, 3))
def test_blocks_come_whole_and_each_piece_once(sizes, epoch):
    edges = np.concatenate([[0], np.cumsum(sizes)])
    count = int(edges[-1])
    order = Order(count, (0, "data"), edges)
    pieces = order(np.arange(count) + epoch * count)
    assert sorted(pieces.tolist()) == list(range(count))
    visited = (np.searchsorted(edges, pieces, side="right") - 1).tolist()
    changes = sum(a != b for a, b in pairwise(visited))
    assert changes == len(set(visited)) - 1  # a block isn't left before it is done


@pytest.mark.parametrize("blocks", [None, np.arange(0, 101, 10)])
def test_each_epoch_has_its_own_order(blocks):
    order = Order(100, (0, "data"), blocks)
    epochs = [tuple(order(np.arange(100) + 100 * epoch).tolist()) for epoch in range(3)]
    assert len(set(epochs)) == 3
