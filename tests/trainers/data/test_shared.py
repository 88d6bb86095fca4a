"""What ranks share of the data, on real process groups. The functions at the top run on each rank."""

from itertools import islice

import numpy as np
import pytest

from tests.trainers.data.corpora import arrays, recipe, tokenizer, write_text
from trainwright.trainers.data import shared
from trainwright.trainers.data import tokenizer as tokenizing
from trainwright.trainers.data.dealing import owned_lanes, whole_cursor
from trainwright.trainers.data.horizon import horizon
from trainwright.trainers.data.shared import (
    load_shared_tokenizer,
    open_shared_stream,
    open_shared_validation,
    shared_horizon,
)
from trainwright.trainers.data.sources import text
from trainwright.trainers.data.stream import open_stream
from trainwright.trainers.data.tokenizer import END
from trainwright.trainers.data.validation import open_validation
from trainwright.trainers.parallel.ranks import Ranks, open_ranks
from trainwright.trainers.platform.cpu import Cpu

DOCUMENTS = [f"number {i} the cat sat on the mat\n" * (1 + i % 5) for i in range(60)]


def facts(batch):
    return *arrays(batch), batch.epoch, batch.ended


def take_batches(made, cursor, steps):
    with open_ranks(made.parallel, Cpu()) as ranks:
        whole = []
        with open_shared_stream(made, tokenizer(), ranks, cursor) as stream:
            for batch in islice(stream, steps):
                whole.append((facts(batch), whole_cursor(batch.cursor, ranks)))
        return ranks.data_rank, whole


def take_validation(made):
    with open_ranks(made.parallel, Cpu()) as ranks:
        batches = open_shared_validation(made, tokenizer(), ranks)
        return ranks.data_rank, None if batches is None else [facts(batch) for batch in batches]


def start(made):
    """What a run's start makes and reads on this rank, in the order in which the trainer does."""
    done = []
    with pytest.MonkeyPatch.context() as patch, open_ranks(made.parallel, Cpu()) as ranks:
        for module, name in [
            (tokenizing, "train_bpe"),
            (text, "_build"),
            (shared, "horizon"),
            (shared, "open_stream"),
            (shared, "open_validation"),
        ]:
            _count(patch, module, name, done)
        own = load_shared_tokenizer(made, ranks)
        steps = shared_horizon(made, own, ranks)
        with open_shared_stream(made, own, ranks) as stream:
            open_shared_validation(made, own, ranks)
            next(stream)
        return done, steps, own.inner.to_str(), own.encode(f"the {END} cat").tolist()


def index(made):
    """How many indexes this rank builds."""
    done = []
    with pytest.MonkeyPatch.context() as patch, open_ranks(made.parallel, Cpu()) as ranks:
        _count(patch, text, "_build", done)
        with open_shared_stream(made, tokenizer(), ranks):
            open_shared_validation(made, tokenizer(), ranks)
    return len(done)


def _count(patch, module, name, done):
    original = getattr(module, name)

    def counted(*args, **options):
        done.append(name)
        return original(*args, **options)

    patch.setattr(module, name, counted)


def parallel(tp, folder, *overrides, pp=1):
    made = recipe(
        folder, "train.seq_len=15", "train.micro_batch_size=1", *overrides
    )  # odd: parts must be aligned
    made.parallel.pp = pp
    made.parallel.tp = tp  # as an override it would be held against this process's number of ranks
    return made


@pytest.mark.parametrize(
    ("ranks", "pp", "tp", "lanes", "batch_size"),
    [
        (4, 1, 2, 3, 3),
        (4, 1, 4, 2, 4),
        (3, 1, 1, 4, 4),
        (4, 1, 2, 6, 3),
        (2, 1, 2, 1, 1),
        (4, 2, 1, 3, 3),
        (4, 2, 2, 2, 4),
        (2, 2, 1, 3, 3),
    ],
)
def test_every_rank_has_its_share_and_peers_the_same(tmp_path, run_on_ranks, ranks, pp, tp, lanes, batch_size):
    write_text(tmp_path, DOCUMENTS)
    made = parallel(tp, tmp_path, f"data.lanes={lanes}", f"train.global_batch_size={batch_size}", pp=pp)
    data_ranks = ranks // tp // pp
    with open_stream(made, tokenizer()) as stream:
        single = list(islice(stream, 6))
    given = [[] for _ in range(ranks)]
    cursor = None
    for half in single[:3], single[3:]:  # the second from the cursor after the first
        for rank, (data_rank, batches) in enumerate(run_on_ranks(take_batches, ranks, made, cursor, 3)):
            assert data_rank == rank // tp % data_ranks
            for (_, whole), expected in zip(batches, half, strict=True):
                np.testing.assert_array_equal(whole, expected.cursor)
            given[rank] += [batch for batch, _ in batches]
        cursor = half[-1].cursor
    for rank in range(ranks):
        with open_stream(made, tokenizer(), rank=rank // tp % data_ranks, ranks=data_ranks) as stream:
            assert given[rank] == [facts(batch) for batch in islice(stream, 6)]


def test_the_end_reaches_the_peers(tmp_path, run_on_ranks):
    write_text(tmp_path, ["the cat sat on the mat " * 8])
    made = parallel(2, tmp_path, "train.steps=null", "train.epochs=1", "data.lanes=1")
    reader, peer = (given for _, given in run_on_ranks(take_batches, 2, made, None, 8))
    assert [batch[-1] for batch, _ in peer][0::7] == [False, True]
    assert [batch for batch, _ in peer] == [batch for batch, _ in reader]


@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)])
def test_validation_sequences_reach_every_rank(tmp_path, run_on_ranks, pp, tp):
    write_text(tmp_path, DOCUMENTS)
    made = parallel(tp, tmp_path, "data.validation.fraction=0.3", "train.validate_sequences=13", pp=pp)
    for data_rank, batches in run_on_ranks(take_validation, 4, made):
        expected = open_validation(made, tokenizer(), rank=data_rank, ranks=4 // tp // pp)
        assert batches == [facts(batch) for batch in expected]


def test_without_validation_data_every_rank_has_none(tmp_path, run_on_ranks):
    write_text(tmp_path, DOCUMENTS)
    given = run_on_ranks(take_validation, 4, parallel(2, tmp_path))
    assert [batches for _, batches in given] == [None] * 4


def test_the_start_makes_each_thing_once(tmp_path, run_on_ranks):
    write_text(tmp_path, DOCUMENTS)
    made = parallel(2, tmp_path, "train.steps=null", "train.epochs=2", "data.validation.fraction=0.2")
    first, *others = run_on_ranks(start, 4, made)
    reads = ["open_stream", "open_validation"]
    assert first[0] == ["_build", "train_bpe", "horizon", *reads]
    assert [done for done, *_ in others] == [[], reads, []]
    assert all(other[1:] == first[1:] for other in others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "train_bpe", None)  # the cache has it
        own = tokenizing.load_tokenizer(made)
    assert first[1:] == (horizon(made, own), own.inner.to_str(), own.encode(f"the {END} cat").tolist())


def test_one_rank_of_a_node_indexes_for_all(tmp_path, run_on_ranks):
    write_text(tmp_path, DOCUMENTS)
    held = write_text(tmp_path / "held", DOCUMENTS[:3])
    made = parallel(1, tmp_path, f"data.validation.paths=[{held}]")
    assert run_on_ranks(index, 4, made) == [2, 0, 0, 0]


def test_a_process_on_its_own_shares_with_nobody(tmp_path):
    write_text(tmp_path, DOCUMENTS)
    made, alone = recipe(tmp_path, "data.validation.fraction=0.3"), Ranks()
    own = load_shared_tokenizer(made, alone)
    with open_shared_stream(made, own, alone) as stream, open_stream(made, own) as plain:
        batch = next(stream)
        assert facts(batch) == facts(next(plain))
    np.testing.assert_array_equal(whole_cursor(batch.cursor, alone), batch.cursor)
    assert len(owned_lanes(4, 0, 1)) == len(batch.cursor)
    given, expected = open_shared_validation(made, own, alone), open_validation(made, own)
    assert [facts(batch) for batch in given] == [facts(batch) for batch in expected]
