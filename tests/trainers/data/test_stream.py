"""The stream is a function of (recipe, seed, step), by properties over random corpora."""

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trainers.data.corpora import (
    arrays,
    batcher,
    lane_pieces,
    own_rows,
    recipe,
    source,
    tokenizer,
    until_ended,
    write_text,
)
from trainwright.errors import BadRequest
from trainwright.trainers.data import refill
from trainwright.trainers.data.batch import IGNORE
from trainwright.trainers.data.cursor import new_cursor
from trainwright.trainers.data.stream import Stream, open_stream

WORDS = st.sampled_from(["cat ", "the ", "hat\n", "x", "é", "😀", "sat on the mat ", "   "])
DOCUMENT = st.lists(WORDS, max_size=40).map("".join)  # some empty, some of several pieces
CORPUS = st.lists(DOCUMENT, min_size=1, max_size=25).filter(any)
SHAPE = st.fixed_dictionaries(
    {
        "lanes": st.sampled_from([1, 2, 3, 4, 6]),
        "seq_len": st.integers(1, 40),
        "document_mask": st.booleans(),
    }
)
BATCH = st.sampled_from(
    [lambda lanes: lanes, lambda lanes: 2 * lanes, lambda lanes: 3 * lanes, lambda lanes: 1]
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def several(documents):
    """Two sources of the same corpus, the second half the weight and backwards."""
    return [source(documents), source(documents[::-1], name="second", weight=0.5)]


@quick
@given(documents=CORPUS, shape=SHAPE, size=BATCH, ranks=st.integers(1, 6), mixed=st.booleans())
def test_ranks_split_the_same_batches(documents, shape, size, ranks, mixed):
    lanes, make = shape.pop("lanes"), (several if mixed else lambda d: [source(d)])
    batch_size = size(lanes)
    ranks = min(ranks, lanes, batch_size)
    whole = batcher(make(documents), lanes=lanes, batch_size=batch_size, epochs=2, **shape)
    parts = [
        batcher(make(documents), lanes=lanes, batch_size=batch_size, epochs=2, rank=r, ranks=ranks, **shape)
        for r in range(ranks)
    ]
    for step in range(12):
        expected, given_ = whole.next(), [part.next() for part in parts]
        assert len({batch.tokens.shape for batch in given_}) == 1
        joined = [own_rows(batch, step, lanes, batch_size, r, ranks) for r, batch in enumerate(given_)]
        for name in ("tokens", "targets", "documents", "cursor"):
            rows = np.concatenate([np.asarray(getattr(batch, name)) for batch in joined])
            np.testing.assert_array_equal(rows, np.asarray(getattr(expected, name)))
        assert expected.ended == all(batch.ended for batch in given_)


@quick
@given(documents=CORPUS, shape=SHAPE, size=BATCH, mixed=st.booleans(), split=st.sampled_from([1, 2, 3]))
def test_resuming_from_any_batch_equals_going_on(documents, shape, size, mixed, split):
    lanes, make = shape.pop("lanes"), (several if mixed else lambda d: [source(d)])
    split = min(split, lanes, size(lanes))
    made = batcher(make(documents), lanes=lanes, batch_size=size(lanes), epochs=3, **shape)
    run = [made.next() for _ in range(10)]
    for step in range(0, 9, 2):
        resumed = batcher(make(documents), cursor=run[step].cursor, batch_size=size(lanes), epochs=3, **shape)
        for later in run[step + 1 :]:
            assert arrays(resumed.next()) == arrays(later)


@quick
@given(documents=CORPUS, shape=SHAPE, reach=st.sampled_from([1, 100, 3000]), at_a_time=st.sampled_from([1, 50]))
def test_how_much_is_tokenized_at_a_time_changes_nothing(documents, shape, reach, at_a_time):
    lanes = shape.pop("lanes")
    expected = batcher(several(documents), lanes=lanes, **shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refill, "FIRST_REACH", reach)
        patch.setattr(refill, "REACH", reach)
        patch.setattr(refill, "BYTES_AT_A_TIME", at_a_time)
        made = batcher(several(documents), lanes=lanes, **shape)
        for _ in range(8):
            assert arrays(made.next()) == arrays(expected.next())


@quick
@given(documents=CORPUS, shape=SHAPE, epochs=st.integers(1, 3))
def test_each_piece_once_per_epoch_and_the_text_comes_back(documents, shape, epochs):
    """The pieces of all lanes, decoded, are the corpus's pieces, each `epochs` times."""
    lanes, tok = shape["lanes"], tokenizer()
    one = source(documents)
    made = batcher([one], epochs=epochs, **{**shape, "document_mask": True})
    given_ = lane_pieces(until_ended(made), lanes)

    def ids(piece):
        return [*tok.encode(piece.text).tolist(), *([tok.eos] if piece.ends else [])]

    for lane, pieces in enumerate(given_):
        positions = np.arange(lane, epochs * one.pieces, lanes)
        expected = [ids(piece) for piece in one.read(positions)]
        assert [p for p in pieces if p != [tok.eos] * len(p)] == expected  # but for the filling at the end
    every = [p.text for p in one.read(np.arange(one.pieces))]
    assert sum(map(len, every)) == sum(map(len, documents))
    read = [tok.decode(p) for pieces in given_ for p in pieces if p != [tok.eos] * len(p)]
    texts = [p.text + ("<|endoftext|>" if p.ends else "") for p in one.read(np.arange(one.pieces))]
    assert sorted(read) == sorted(texts * epochs)


@quick
@given(documents=CORPUS, shape=SHAPE)
def test_targets_and_documents_follow_from_the_tokens(documents, shape):
    """Each token is an input once; its target is the next token of its piece, across sequences too."""
    lanes, mask = shape["lanes"], shape["document_mask"]
    made = batcher([source(documents)], epochs=1, **shape)
    batches = until_ended(made)
    one = source(documents)
    for lane in range(lanes):
        pieces = tokenizer().encode_pieces(one.read(np.arange(lane, one.pieces, lanes)))
        stream = [int(t) for piece in pieces for t in piece]
        if mask:
            nexts = [t for piece in pieces for t in [*piece[1:].tolist(), IGNORE]]
        else:
            nexts = [*stream[1:], IGNORE][: len(stream)]
        number = [i for i, piece in enumerate(pieces) for _ in piece]
        tokens = np.concatenate([b.tokens[lane].numpy() for b in batches])
        targets = np.concatenate([b.targets[lane].numpy() for b in batches])
        assert tokens[: len(stream)].tolist() == stream
        assert targets.tolist() == nexts + [IGNORE] * (len(targets) - len(stream))
        for index, batch in enumerate(batches):
            own = number[index * shape["seq_len"] : (index + 1) * shape["seq_len"]]
            want = [n - own[0] for n in own] if mask else [0] * len(own)
            assert batch.documents[lane].tolist()[: len(own)] == want


@quick
@given(documents=CORPUS, lanes=st.sampled_from([1, 2, 3, 5]), seq_len=st.integers(1, 30))
def test_a_batch_of_several_sequences_a_lane_is_the_batches_of_one(documents, lanes, seq_len):
    single = batcher([source(documents)], lanes=lanes, seq_len=seq_len)
    double = batcher([source(documents)], lanes=lanes, seq_len=seq_len, batch_size=2 * lanes)
    for _ in range(5):
        both, first, second = double.next(), single.next(), single.next()
        assert both.tokens[0::2].tolist() == first.tokens.tolist()
        assert both.tokens[1::2].tolist() == second.tokens.tolist()
        assert both.targets[1::2].tolist() == second.targets.tolist()
        assert both.documents[1::2].tolist() == second.documents.tolist()


@quick
@given(documents=CORPUS, turns=st.sampled_from([2, 3]), seq_len=st.integers(1, 30))
def test_fewer_sequences_than_lanes_take_the_lanes_in_turn(documents, turns, seq_len):
    lanes = 6
    whole = batcher([source(documents)], lanes=lanes, seq_len=seq_len)
    part = batcher([source(documents)], lanes=lanes, seq_len=seq_len, batch_size=lanes // turns)
    for _ in range(4):
        expected = whole.next()
        for turn in range(turns):
            assert part.next().tokens.tolist() == expected.tokens[turn::turns].tolist()


def test_a_cursor_taken_in_mid_turn_serves_another_batch_size():
    documents = ["the cat sat on the mat " * 20] * 6
    made = batcher([source(documents)], lanes=4, batch_size=2)
    cursor = made.next().cursor  # lanes 0 and 2 have given one, 1 and 3 none
    whole = batcher([source(documents)], lanes=4)
    first, second = whole.next(), whole.next()
    resumed = batcher([source(documents)], cursor=cursor).next()
    assert resumed.tokens[0::2].tolist() == second.tokens[0::2].tolist()
    assert resumed.tokens[1::2].tolist() == first.tokens[1::2].tolist()


@pytest.mark.parametrize(("lanes", "batch_size", "ranks"), [(2, 2, 3), (4, 2, 3), (4, 6, 1), (6, 4, 1)])
def test_lanes_batch_and_ranks_that_do_not_fit(lanes, batch_size, ranks):
    with pytest.raises(BadRequest, match="lanes"):
        batcher([source(["text"])], lanes=lanes, batch_size=batch_size, ranks=ranks)


@quick
@given(weights=st.lists(st.floats(0.5, 4), min_size=2, max_size=4), lanes=st.sampled_from([1, 4]))
def test_a_mix_holds_its_shares_of_tokens(weights, lanes):
    corpora = [[f"{word} " * (3 + 2 * i)] * 4 for i, word in enumerate(["cat", "hat", "mat", "sat"])]
    sources = [source(corpora[i], name=str(i), weight=w, limit=256) for i, w in enumerate(weights)]
    made = batcher(sources, lanes=lanes, seq_len=64)
    for _ in range(40):
        cursor = made.next().cursor
    count = len(weights)
    longest = max(len(tokenizer().encode(c[0])) + 1 for c in corpora)
    for row in cursor:
        tokens = row[count : 2 * count]
        shares = np.array(weights) / sum(weights)
        slack = longest * (1 + 1 / shares.min()) / tokens.sum()
        assert np.abs(tokens / tokens.sum() - shares).max() < slack


def test_the_first_pieces_of_a_mix_are_dealt_over_the_lanes():
    sources = [source(["cat " * 100], name="a", weight=3, limit=4096), source(["hat " * 100], name="b")]
    batch = batcher(sources, lanes=64, seq_len=4).next()
    cats = sum("cat" in tokenizer().decode(row) for row in batch.tokens.tolist())
    assert cats == pytest.approx(48, abs=2)


def test_an_exhausted_source_leaves_the_rest_to_the_others():
    sources = [source(["cat "], name="short"), source(["hat "] * 20, name="long")]
    batches = until_ended(batcher(sources, lanes=2, epochs=1, seq_len=8))
    text = "".join(tokenizer().decode(row) for batch in batches for row in batch.tokens.tolist())
    assert (text.count("cat"), text.count("hat")) == (1, 20)


def test_past_the_end_batches_stay_ended_and_without_targets():
    made = batcher([source(["cat"])], lanes=3, epochs=2)  # fewer documents than lanes
    assert len(until_ended(made)) == 1
    for _ in range(3):
        batch = made.next()
        assert batch.ended
        assert (batch.targets == IGNORE).all()


def test_a_document_of_a_million_tokens():
    text = "the cat sat on another mat\n" * 150_000
    one = source([text], limit=65536)
    made = batcher([one], lanes=4, seq_len=4096, epochs=1)
    tokens = sum(int((b.targets != IGNORE).sum()) for b in until_ended(made))
    whole = sum(len(ids) for ids in tokenizer().encode_pieces(one.read(np.arange(one.pieces))))
    assert whole > 1_000_000
    assert tokens == whole - one.pieces


def test_resuming_reads_only_the_piece_in_progress_of_each_lane():
    """Also of a lane far into a piece that is much longer than most."""
    documents = [f"{i} the cat " * (200 if i % 4 == 0 else 2) for i in range(200)]
    made = batcher([source(documents, limit=4096)], lanes=4, seq_len=8)
    offsets = -3  # a column of the cursor
    far = next(c for _ in range(3000) if ((c := made.next().cursor)[:, offsets] > 100).all())
    again = source(documents, limit=4096)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refill, "FIRST_REACH", 0)
        batcher([again], cursor=far, seq_len=8).next()
    assert len(again._documents.reads) == 4


def test_memory_stays_bounded_with_1024_lanes():
    documents = ["the cat sat on the mat with another hat " * 20 for _ in range(400)]
    longest = max(len(tokenizer().encode(d)) + 1 for d in documents)
    made = batcher([source(documents, limit=4096)], lanes=1024, seq_len=64)
    reach = refill.REACH * refill.tokenizer_threads()
    for _ in range(30):
        made.next()
        assert 0 < made.buffered() <= 1024 * (64 + 2 * longest) + 2 * reach


def test_epoch_counts_passes():
    made = batcher([source(["the cat sat on the mat "] * 16)], lanes=2, epochs=3)
    epochs = [batch.epoch for batch in until_ended(made)]
    assert epochs == sorted(epochs)
    assert epochs[-1] == pytest.approx(3)


# The background thread


@pytest.mark.parametrize("prefetch", [1, 7])
def test_prefetching_changes_nothing(tmp_path, prefetch):
    write_text(tmp_path, [f"{i} the cat sat on the mat\n" * (i % 5) for i in range(40)])
    with open_stream(recipe(tmp_path, f"data.prefetch={prefetch}"), tokenizer()) as stream:
        given_ = [arrays(next(stream)) for _ in range(10)]
    again = recipe(tmp_path)
    for rank in range(2):
        with open_stream(again, tokenizer(), rank=rank, ranks=2) as stream:
            for step in range(10):
                own = slice(2 * rank, 2 * rank + 2)
                assert arrays(next(stream)) == tuple(part[own] for part in given_[step])
    cursor = np.array(given_[4][3])
    with open_stream(again, tokenizer(), cursor=cursor) as stream:
        assert [arrays(next(stream)) for _ in range(5)] == given_[5:]


def test_errors_surface_in_the_consumer_and_no_thread_stays():
    before = threading.active_count()

    def fail():
        raise BadRequest("the disk is gone")

    stream = Stream(fail, new_cursor(1, 1), ahead=2)
    with pytest.raises(BadRequest, match="disk is gone"):
        next(stream)
    assert threading.active_count() == before


def test_close_leaves_no_thread_even_when_nobody_reads(tmp_path):
    write_text(tmp_path, ["the cat"])
    before = threading.active_count()
    with open_stream(recipe(tmp_path), tokenizer()) as stream:
        next(stream)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)


def test_a_cursor_of_other_data_is_refused(tmp_path):
    write_text(tmp_path, ["the cat", "the hat"])
    with open_stream(recipe(tmp_path), tokenizer()) as stream:
        cursor = next(stream).cursor
    with pytest.raises(BadRequest, match="other sources"):
        open_stream(recipe(tmp_path), tokenizer(), cursor=cursor[:, 1:])
    with pytest.raises(BadRequest, match="resume=none"):
        open_stream(recipe(tmp_path, "seed=1"), tokenizer(), cursor=cursor)
    write_text(tmp_path, ["the cat", "the hat", "the mat"])
    with pytest.raises(BadRequest, match="changed"):
        open_stream(recipe(tmp_path), tokenizer(), cursor=cursor)
