from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainers.data.corpora import arrays, batcher, own_rows, source
from trainwright.trainers.data.batch import IGNORE
from trainwright.trainers.data.dealing import own_cursor, owned_lanes, rows_in_a_batch
from trainwright.trainers.parallel.ranks import Ranks

DOCUMENTS = [f"{i} the cat sat on the mat " * (1 + i % 7) for i in range(50)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 7, 8])
def test_lanes_are_dealt_evenly(ranks):
    owned = [owned_lanes(8, rank, ranks) for rank in range(ranks)]
    assert [lane for own in owned for lane in own] == list(range(8))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


@given(smaller=st.integers(1, 40), times=st.integers(1, 6), more_lanes=st.booleans(), data=st.data())
def test_the_rows_of_a_batch_are_the_most_that_any_rank_has(smaller, times, more_lanes, data):
    lanes, batch_size = (smaller * times, smaller) if more_lanes else (smaller, smaller * times)
    ranks = data.draw(st.integers(1, smaller))
    turns, sequences = max(1, lanes // batch_size), max(1, batch_size // lanes)
    counts = [
        sum(lane % turns == turn for lane in owned_lanes(lanes, rank, ranks)) * sequences
        for rank in range(ranks)
        for turn in range(turns)
    ]
    assert rows_in_a_batch(lanes, batch_size, ranks) == max(counts)


def test_nothing_is_copied_where_nothing_is_blank():
    batch = batcher([source(DOCUMENTS)], lanes=4, rank=1, ranks=2).next()
    assert batch.filled_up(2, eos=7) is batch


def test_blank_rows_are_the_end_of_text_without_targets():
    batch = batcher([source(DOCUMENTS)], lanes=2).next()
    filled = batch.filled_up(5, eos=7)
    assert arrays(filled.sequences(0, 2)) == arrays(batch)
    for name, value in ("tokens", 7), ("targets", IGNORE), ("documents", 0):
        blank, own = getattr(filled, name)[2:], getattr(batch, name)
        assert blank.tolist() == [[value] * 16] * 3
        assert blank.dtype == own.dtype


@pytest.mark.parametrize(("lanes", "batch_size"), [(4, 4), (6, 6), (4, 8), (7, 21), (8, 4), (15, 5)])
def test_the_run_goes_on_over_any_number_of_ranks(lanes, batch_size):
    """From 2 ranks to 3 to 1 to 4, stopping in the middle of turns too: always the single process's batches."""
    whole = batcher([source(DOCUMENTS)], lanes=lanes, batch_size=batch_size)
    cursor, step = None, 0
    for ranks in (2, 3, 1, 4):
        parts = [
            batcher(
                [source(DOCUMENTS)],
                **({"lanes": lanes} if cursor is None else {"cursor": cursor}),
                batch_size=batch_size,
                rank=rank,
                ranks=ranks,
            )
            for rank in range(ranks)
        ]
        for _ in range(5):
            expected, given_ = whole.next(), [part.next() for part in parts]
            own = [own_rows(batch, step, lanes, batch_size, r, ranks) for r, batch in enumerate(given_)]
            together = [list(chain(*rows)) for rows in zip(*map(arrays, own), strict=True)]
            assert tuple(together) == arrays(expected)
            assert {len(batch.tokens) for batch in given_} == {rows_in_a_batch(lanes, batch_size, ranks)}
            step += 1
        cursor = np.concatenate([batch.cursor for batch in given_])
        for rank, batch in enumerate(given_):
            mine = own_cursor(cursor, Ranks(data_rank=rank, data_ranks=ranks))
            np.testing.assert_array_equal(mine, batch.cursor)
