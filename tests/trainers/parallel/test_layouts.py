"""The layout never changes the run: the benchmark's table, with a model that trains in a second."""

import json
from pathlib import Path

import pytest

from benchmarks.layouts import (
    BEGIN,
    END,
    LAYOUTS,
    RESULTS,
    Layout,
    as_markdown,
    beyond,
    differences,
    with_table,
)
from tests.ranks import RankPool
from tests.trainers.parallel.runs import Alone, train_and_read
from trainwright.configs.compose import load_recipe
from trainwright.trainers.data.batch import IGNORE
from trainwright.trainers.data.stream import open_stream
from trainwright.trainers.data.tokenizer import load_tokenizer

DOCS = Path(__file__).parents[3] / "docs" / "parallelism.md"


# Ranks take their time on two cores: of these layouts `make test` has one of each kind.
QUICK = {
    "fp32": (
        *("4 micro-batches", "DP 2", "ZeRO-1 on 2", "FSDP 2", "FSDP 2, 4 micro-batches", "HSDP 2 x 2"),
        *("TP 2", "TP 2 without SP", "FSDP 2 x TP 2", "PP 2", "PP 2, interleaved", "PP 2, zero bubble"),
    ),
    "mixed": ("FSDP 2", "TP 2", "PP 2"),
    "bf16_sr": ("FSDP 2", "TP 2"),
}
ROWS = [
    pytest.param(
        row,
        marks=() if row.name in QUICK[row.precision] else pytest.mark.slow,
        id=f"{row.name} {row.precision}",
    )
    for row in LAYOUTS
]


@pytest.mark.parametrize("row", ROWS)
def test_a_layout_does_not_change_the_run(
    run_on_ranks: RankPool, base: list[str], alone: Alone, tmp_path: Path, row: Layout
):
    words = [*base, f"run.dir={tmp_path}", "run.name=run", *row.recipe, *row.overrides]
    metrics = run_on_ranks(train_and_read, row.ranks, words)[0]
    assert len(metrics) == 30
    found = differences(metrics, alone(*row.recipe))
    assert beyond(found, row.precision) == {}, found


@pytest.mark.parametrize(("ranks", "batch"), [(2, 8), (4, 8), (4, 6)])
def test_ranks_hold_different_numbers_of_target_tokens(base: list[str], ranks: int, batch: int):
    # Else the table could not tell a mean over the ranks from a mean over the tokens.
    recipe = load_recipe([*base, f"train.global_batch_size={batch}", f"train.micro_batch_size={batch}"])
    tokenizer = load_tokenizer(recipe)
    targets = []
    for rank in range(ranks):
        with open_stream(recipe, tokenizer, rank=rank, ranks=ranks) as stream:
            targets.append([int((next(stream).targets != IGNORE).sum()) for _ in range(30)])
    assert all(max(step) > 1.03 * min(step) for step in zip(*targets, strict=True))


def test_every_layout_has_a_name_of_its_own():
    names = [(row.name, row.precision) for row in LAYOUTS]
    assert len(set(names)) == len(names)


def test_a_difference_is_the_largest_of_any_step_and_must_be_a_number():
    def line(step: int, **values: float) -> dict[str, float]:
        same = {"step": step, "tokens": 10, "lr": 1.0, "loss": 4.0, "val_loss": 4.0}
        return same | {"grad_norm": 2.0, "param_norm": 5.0} | values

    alone = [line(1), line(2), line(3)]
    same = dict.fromkeys(["tokens", "lr", "first_loss", "loss", "val_loss", "grad_norm", "param_norm"], 0.0)
    assert differences(alone[:2], alone) == same
    assert beyond(same, "fp32") == {}
    found = differences([line(1), line(2, grad_norm=2.5, loss=4.0002), line(3, grad_norm=1.9)], alone)
    assert found == same | {"grad_norm": 0.25, "loss": pytest.approx(5e-5)}
    assert beyond(found, "fp32") == {"grad_norm": 0.25}
    assert beyond(same | {"tokens": 1e-9}, "mixed") == {"tokens": 1e-9}
    assert list(beyond(differences([line(1, loss=float("nan"))], alone), "mixed")) == ["first_loss", "loss"]
    for other in [], [line(2)], [*alone, line(4)]:
        with pytest.raises(ValueError, match="different steps"):
            differences(other, alone)


def test_a_table_is_put_between_the_markers():
    page = f"above\n{BEGIN}\nold\n{END}\nbelow {END}\n"
    assert with_table(page, "new") == f"above\n{BEGIN}\nnew\n{END}\nbelow {END}\n"
    with pytest.raises(ValueError, match="the page has no <!-- layouts -->"):
        with_table(f"{END} {BEGIN}", "new")


def test_the_docs_have_the_benchmarks_figures():
    results = json.loads(RESULTS.read_text())
    page = DOCS.read_text()
    assert page == with_table(page, as_markdown(results)), f"benchmarks/layouts.py --docs {DOCS} rewrites it"
    measured = [
        (row["name"], row["ranks"], tuple(row["overrides"]), tuple(row["recipe"])) for row in results["rows"]
    ]
    assert measured == [tuple(row) for row in LAYOUTS]
    assert all(beyond(row["differences"], row["precision"]) == {} for row in results["rows"])
