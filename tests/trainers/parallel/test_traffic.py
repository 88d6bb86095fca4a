"""What the formulas say of a step is what a real step does."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.traffic import (
    LAYOUTS,
    RESULTS,
    as_markdown,
    as_sent,
    count_step,
    figures,
    with_table,
    words_of,
)
from tests.ranks import RankPool
from trainwright.configs.compose import load_recipe
from trainwright.configs.degrees import Degrees, resolve_degrees, world_size
from trainwright.models import cross_entropy
from trainwright.trainers.parallel.counting import Counts
from trainwright.trainers.parallel.traffic import by_group, crossing, step_traffic

# Sizes that don't divide by 4, so that FSDP has to fill shards up; micro-batches that aren't all the same.
SMALL = [
    "model.vocab_size=306",
    "model.hidden_size=30",
    "model.head_dim=6",
    "model.intermediate_size=512",
    "model.num_attention_heads=4",
    "model.tie_word_embeddings=false",
    "data.validation.fraction=0",
    "train.validate_every=null",
    "train.steps=3",
    "train.global_batch_size=6",
    "train.micro_batch_size=2",
    "checkpoint.every=null",
]
DOCS = Path(__file__).parents[3] / "docs" / "parallelism.md"
INTERLEAVED = "parallel.pp_schedule=interleaved_1f1b model.num_hidden_layers=4"
CHUNK = 50 * 306 // 2


def count_and_calculate(words: list[str]) -> tuple[Counts, Counts]:
    # As many positions of the loss at a time as to make several chunks of a micro-batch.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_ELEMENTS", CHUNK)
        return count_step(words), calculate(words)


def calculate(words: list[str]) -> Counts:
    recipe = load_recipe(words)
    degrees = resolve_degrees(recipe.parallel, world_size())
    pp_rank, data_rank = divmod(int(os.environ["RANK"]) // degrees.tp, degrees.data)
    return as_sent(by_group(step_traffic(recipe, degrees, data_rank, pp_rank), degrees), degrees)


QUICK_FOR_FOUR = ("parallel.tp=2", "parallel.pp=2 parallel.zero=3 train.micro_batch_size=1")
STEPS = [
    (2, "parallel.zero=0"),
    (2, "parallel.zero=1"),
    (2, "parallel.zero=2"),
    (2, "parallel.zero=3"),
    (2, "train.micro_batch_size=6"),
    (2, "model.tie_word_embeddings=true"),
    (2, "precision=mixed train.activation_checkpointing=full"),
    (4, ""),
    (4, "parallel.zero=2 model.tie_word_embeddings=true"),
    (4, "parallel.dp_replicate=2 train.global_batch_size=8 train.micro_batch_size=1"),
    (4, "parallel.dp_replicate=2 parallel.zero=1 train.global_batch_size=8 train.micro_batch_size=1"),
    (2, "parallel.tp=2"),
    (2, "parallel.tp=2 parallel.sp=false"),
    (2, "parallel.tp=2 model.coalesce=false"),
    (2, "parallel.tp=2 parallel.sp=false model.coalesce=false train.activation_checkpointing=full"),
    (2, "parallel.tp=2 train.activation_checkpointing=full model.tie_word_embeddings=true"),
    (2, "parallel.tp=2 train.activation_checkpointing=selective model.coalesce=false"),
    (2, "parallel.tp=2 precision=mixed"),
    (4, "parallel.tp=2"),
    (4, "parallel.tp=2 parallel.zero=0 train.global_batch_size=3 train.micro_batch_size=1"),
    (4, "parallel.tp=2 precision=mixed train.activation_checkpointing=full parallel.sp=false"),
    (4, "parallel.tp=2 data.lanes=3 model.hidden_size=33"),
    (4, "parallel.tp=4 model.num_key_value_heads=2 model.vocab_size=308"),
    (2, "parallel.tp=2 model.num_key_value_heads=1 parallel.sp=false model.coalesce=false"),
    (2, "parallel.pp=2"),
    (2, "parallel.pp=2 precision=mixed train.activation_checkpointing=full"),
    (2, f"parallel.pp=2 {INTERLEAVED}"),
    (2, "parallel.pp=2 parallel.pp_schedule=zero_bubble"),
    (4, "parallel.pp=4 train.micro_batch_size=1 model.num_hidden_layers=5"),
    (4, "parallel.pp=2 parallel.zero=0 train.micro_batch_size=1"),
    (4, "parallel.pp=2 parallel.zero=1 train.micro_batch_size=1"),
    (4, "parallel.pp=2 parallel.zero=2 train.micro_batch_size=1"),
    (4, "parallel.pp=2 parallel.zero=3 train.micro_batch_size=1"),
    (4, "parallel.pp=2 parallel.zero=3"),
    (4, f"parallel.pp=2 parallel.zero=2 train.micro_batch_size=1 train.global_batch_size=8 {INTERLEAVED}"),
    (4, f"parallel.pp=2 parallel.zero=3 train.micro_batch_size=1 train.global_batch_size=8 {INTERLEAVED}"),
    (4, "parallel.pp=2 parallel.zero=1 train.micro_batch_size=1 parallel.pp_schedule=zero_bubble"),
    (4, "parallel.pp=2 parallel.tp=2"),
    (4, f"parallel.pp=2 parallel.tp=2 parallel.sp=false {INTERLEAVED}"),
]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        pytest.param(*row, marks=() if row[0] == 2 or row[1] in QUICK_FOR_FOUR else pytest.mark.slow)
        for row in STEPS
    ],
)
def test_a_step_sends_what_the_formula_says(run_on_ranks: RankPool, tiny: list[str], ranks: int, words: str):
    words = [*tiny, *SMALL, *words.split()]
    for rank, (counted, calculated) in enumerate(run_on_ranks(count_and_calculate, ranks, words)):
        assert counted == calculated, rank


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_of_the_docs_without_any_rank(monkeypatch: pytest.MonkeyPatch, tied: bool):
    """The closed forms of docs/parallelism.md, for 1024 ranks that aren't there."""
    _, r, s, t = degrees = Degrees(dp_replicate=8, dp_shard=16, tp=8)
    monkeypatch.setenv("WORLD_SIZE", str(r * s * t))
    hidden, layers, words, inner = 4096, 32, 32000, 14336
    heads, length, sequences, micro = 32, 4096, 4, 2
    recipe = load_recipe(
        [
            *(f"model.hidden_size={hidden}", f"model.num_hidden_layers={layers}", f"model.vocab_size={words}"),
            *(f"model.num_attention_heads={heads}", "model.num_key_value_heads=8"),
            *(f"model.intermediate_size={inner}", f"model.tie_word_embeddings={tied}"),
            *(f"train.seq_len={length}", f"model.max_position_embeddings={length}", "precision=mixed"),
            *(f"train.global_batch_size={sequences * r * s}", f"train.micro_batch_size={sequences // micro}"),
            *(f"parallel.dp_replicate={r}", f"parallel.tp={t}"),
        ]
    )
    table = hidden * words // t
    layer = (hidden * (heads + 16 + heads) * (hidden // heads) + 3 * hidden * inner) // t + 2 * hidden
    first, last = (0, table + hidden) if tied else (table, table + hidden)
    weights = first + layers * layer + last
    units = layers + (1 if tied else 2)
    gathers = micro * (2 * layers + (1 if tied else 2))
    gathered = micro * 2 * (2 * weights - first - last)
    positions = sequences * length
    calls = micro * (4 * layers + 2)
    activations = positions * hidden * 2 * (4 * layers + 2)
    chunks = micro * (positions // micro // (2**23 // (words // t)) + 1)
    norms = 4 * (2 * layers + 1) * hidden // s
    assert by_group(step_traffic(recipe, degrees), degrees) == {
        ("dp_replicate", "all_reduce"): (units, 4 * weights // s),
        ("dp_shard", "all_gather"): (gathers, gathered),
        ("dp_shard", "reduce_scatter"): (micro * units, micro * 4 * weights),
        ("tp", "all_gather"): (calls, activations),
        ("tp", "all_reduce"): (1 + 2 * chunks, norms + 12 * positions),
        ("tp", "broadcast"): (1, 20 * positions + 16 + 8 * sequences * 6),
        ("tp", "reduce_scatter"): (calls, activations),
        ("world", "all_reduce"): (1, 48),
    }


def test_one_rank_sends_nothing():
    assert step_traffic(load_recipe([]), Degrees()) == []


@pytest.mark.parametrize(
    ("kind", "crosses"), [("all_gather", 75), ("reduce_scatter", 75), ("broadcast", 75), ("all_reduce", 150)]
)
def test_what_crosses_the_wire(kind: str, crosses: int):
    assert crossing(kind, 4, 100) == crosses


def test_the_results_are_of_these_formulas_and_the_docs_have_them(monkeypatch: pytest.MonkeyPatch):
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [(row["layout"], row["ranks"], row["words"]) for row in rows] == LAYOUTS
    for row in rows:
        monkeypatch.setenv("WORLD_SIZE", str(row["ranks"]))
        assert row["same"]
        assert figures(words_of(row["words"], "."), row["ranks"])[1].items() <= row.items(), row["layout"]
    page = DOCS.read_text()
    assert page == with_table(page, as_markdown(rows)), f"benchmarks/traffic.py --docs {DOCS} rewrites it"
