import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainers.data.corpora import recipe, tokenizer, write_jsonl, write_text
from trainwright.errors import BadRequest
from trainwright.trainers.data.batch import IGNORE
from trainwright.trainers.data.holdout import holdout
from trainwright.trainers.data.opening import open_sources
from trainwright.trainers.data.stream import horizon, open_stream, open_validation

DOCUMENTS = [f"number {i} the cat sat on the mat\n" * 3 for i in range(60)]


def texts(sources):
    return {piece.text for source in sources for piece in source.read(np.arange(source.pieces))}


def rows(batches):
    """The sequences with a target."""
    return [
        batch.tokens[row].tolist()
        for batch in batches
        for row in range(len(batch.tokens))
        if (batch.targets[row] != IGNORE).any()
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_documents_are_disjoint_and_the_same_for_every_seed(tmp_path, seed):
    write_text(tmp_path, DOCUMENTS)
    made = recipe(tmp_path, "data.validation.fraction=0.2", f"seed={seed}")
    train, held = texts(open_sources(made)), texts(open_sources(made, "validation"))
    assert not train & held
    assert train | held == set(DOCUMENTS)
    assert held == texts(open_sources(recipe(tmp_path, "data.validation.fraction=0.2"), "validation"))


@given(fraction=st.sampled_from([0.02, 0.1, 0.5, 0.9]))
def test_the_share_held_out(fraction):
    held = holdout("data", fraction, "validation")(np.arange(20_000))
    assert abs(held.mean() - fraction) < 0.015
    assert (held == ~holdout("data", fraction, "train")(np.arange(20_000))).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_sequences_are_the_same_for_every_layout(tmp_path, ranks, micro):
    write_text(tmp_path, DOCUMENTS)
    options = ["data.validation.fraction=0.3", "train.validate_sequences=13"]
    whole = open_validation(recipe(tmp_path, *options), tokenizer())
    made = recipe(tmp_path, *options, f"train.micro_batch_size={micro}")
    parts = [open_validation(made, tokenizer(), rank=rank, ranks=ranks) for rank in range(ranks)]
    assert [row for part in parts for row in rows(part)] == rows(whole)
    assert len(rows(whole)) == 13
    assert len({len(part) for part in parts}) == 1
    assert all(batch.tokens.shape == (micro, 16) for part in parts for batch in part)


def test_few_sequences_are_each_given_once(tmp_path):
    write_text(tmp_path, DOCUMENTS)
    made = recipe(tmp_path, "data.validation.fraction=0.1", "train.validate_sequences=10000")
    held = [tokenizer().encode(text).tolist() for text in texts(open_sources(made, "validation"))]
    given_ = sum(row.count(token) for row in rows(open_validation(made, tokenizer())) for token in {*row} - {0})
    assert given_ >= 0.99 * sum(map(len, held))


def test_files_of_their_own(tmp_path):
    write_text(tmp_path, DOCUMENTS)
    other = write_text(tmp_path / "held", ["another hat " * 40])
    made = recipe(tmp_path, f"data.validation.paths=[{other}]")
    assert texts(open_sources(made)) == set(DOCUMENTS)
    assert tokenizer().decode(rows(open_validation(made, tokenizer()))[0]).startswith("another hat")


def test_files_of_their_own_beside_a_mix_and_the_standard_library(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    other = write_text(tmp_path / "held", ["another hat " * 40])
    mixed = recipe(
        tmp_path,
        "data.mix.a.format=jsonl",
        f"data.mix.a.paths=[{first}]",
        f"data.validation.paths=[{other}]",
        data="mix",
    )
    plain = recipe(
        tmp_path,
        "data.validation.fraction=0",
        f"data.validation.paths=[{other}]",
        "data.pattern='*'",
        data="stdlib",
    )
    for made in (mixed, plain):
        assert tokenizer().decode(rows(open_validation(made, tokenizer()))[0]).startswith("another hat")


def test_none_without_validation_data(tmp_path):
    write_text(tmp_path, DOCUMENTS)
    assert open_validation(recipe(tmp_path), tokenizer()) is None


def test_a_fraction_that_leaves_one_side_empty(tmp_path):
    write_text(tmp_path, ["one document"])
    made = recipe(tmp_path, "data.validation.fraction=0.5")
    held = bool(holdout("data", 0.5, "validation")(np.arange(1))[0])
    part, word = ("train", "lower it") if held else ("validation", "raise it")
    with pytest.raises(BadRequest, match=rf"data\.validation\.fraction=0\.5 has no document.*{word}"):
        open_sources(made, part)


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_horizon_is_about_the_steps_that_a_run_has(tmp_path, epochs):
    write_text(tmp_path, DOCUMENTS * 4)
    made = recipe(tmp_path, "train.steps=null", f"train.epochs={epochs}")
    steps = 0
    with open_stream(made, tokenizer()) as stream:
        while not next(stream).ended:
            steps += 1
    assert horizon(made, tokenizer()) == pytest.approx(steps, rel=0.05)
    assert horizon(recipe(tmp_path), tokenizer()) is None
