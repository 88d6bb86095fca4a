"""A rehearsal says what a real step does: on ranks that aren't there, held against those that are."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.rehearsal import GIB, RESULTS, with_tables
from tests.ranks import RankPool
from tests.trainers.plan.toy import CLUSTER, TINY
from trainwright.configs.compose import load_recipe
from trainwright.configs.degrees import Degrees, resolve_degrees
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.models import cross_entropy, llama_plan
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.parallel.traffic import by_group, step_traffic
from trainwright.trainers.plan.layout import Layout
from trainwright.trainers.plan.memory import Memory
from trainwright.trainers.plan.rehearsal import memory_of_kinds, rehearse, rehearsed, stage_ranks
from trainwright.trainers.plan.rehearsal_step import Blank, watch_steps
from trainwright.trainers.plan.rehearsal_verb import rehearse_and_tell
from trainwright.trainers.platform.cpu import Cpu

# Sizes that don't divide by 4, so that FSDP has to fill shards up; micro-batches that aren't all the same.
SMALL = [
    "model.vocab_size=306",
    "model.hidden_size=30",
    "model.head_dim=6",
    "model.intermediate_size=512",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.tie_word_embeddings=false",
    "data.tokenizer.vocab_size=306",
    "train.seq_len=32",
    "train.global_batch_size=6",
    "train.micro_batch_size=2",
]
INTERLEAVED = "parallel.pp_schedule=interleaved_1f1b model.num_hidden_layers=4"
CHUNK = 50 * 306 // 2
DOCS = Path(__file__).parents[3] / "docs" / "rehearsal.md"


def recipe_for(ranks: int, *words: str) -> Recipe:
    """A recipe that is checked for so many ranks."""
    return load_recipe([word for several in words for word in several.split()], lambda _: [ranks], planned=True)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (2, "parallel.zero=0"),
        (2, "parallel.zero=3"),
        (2, "parallel.zero=1 train.global_batch_size=22"),
        (2, "parallel.zero=3 train.global_batch_size=22 precision=mixed"),
        (2, "precision=bf16_sr train.activation_checkpointing=full"),
        pytest.param(
            4,
            "parallel.dp_replicate=2 parallel.zero=1 train.global_batch_size=8 train.micro_batch_size=1",
            marks=pytest.mark.slow,
        ),
        (2, "parallel.tp=2 parallel.sp=false model.coalesce=false"),
        (2, "parallel.tp=2 train.activation_checkpointing=selective model.coalesce=false"),
        pytest.param(
            4,
            "parallel.tp=2 precision=mixed train.activation_checkpointing=full parallel.sp=false",
            marks=pytest.mark.slow,
        ),
        pytest.param(4, "parallel.tp=4 model.vocab_size=308", marks=pytest.mark.slow),
        (2, "parallel.pp=2 parallel.pp_schedule=zero_bubble"),
        (2, "parallel.pp=2 train.global_batch_size=20"),
        pytest.param(
            4,
            "parallel.pp=2 parallel.zero=3 train.micro_batch_size=1 train.global_batch_size=20",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            f"parallel.pp=2 parallel.zero=3 train.micro_batch_size=1 train.global_batch_size=24 {INTERLEAVED}",
            marks=pytest.mark.slow,
        ),
        (4, f"parallel.pp=2 parallel.tp=2 parallel.sp=false {INTERLEAVED}"),
    ],
)
def test_ranks_send_what_the_formula_says(monkeypatch: pytest.MonkeyPatch, ranks: int, words: str):
    # As many positions of the loss at a time as to make several chunks of a micro-batch.
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", CHUNK)
    recipe = recipe_for(ranks, *SMALL, words)
    degrees = resolve_degrees(recipe.parallel, ranks)
    for rank in (0, ranks - 1):
        pp_rank, data_rank = divmod(rank // degrees.tp, degrees.data)
        expected = by_group(step_traffic(recipe, degrees, data_rank, pp_rank), degrees)
        assert rehearse(recipe, ranks, rank, "neuron").collectives == expected, rank


# The 5 M Llama with half its layers.
LLAMA = ["model.num_hidden_layers=3", "train.global_batch_size=4", "train.micro_batch_size=2"]


def measure(words: list[str]) -> Memory:
    """The same steps on real tensors and ranks."""
    recipe = load_recipe(words)
    with open_ranks(recipe.parallel, Cpu()) as ranks:
        watched = watch_steps(Blank(recipe, ranks), Cpu(), [4 // ranks.data_ranks] * 2)
    return max(map(memory_of_kinds, watched.by_moment.values()), key=lambda memory: memory.total)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ""),
        (1, "precision=mixed train.activation_checkpointing=selective"),
        pytest.param(2, "train.activation_checkpointing=selective", marks=pytest.mark.slow),
        pytest.param(2, "precision=mixed parallel.zero=1 train.micro_batch_size=1", marks=pytest.mark.slow),
        (2, "precision=bf16_sr parallel.zero=2 train.micro_batch_size=1"),
        pytest.param(2, "parallel.tp=2 precision=mixed", marks=pytest.mark.slow),
        (2, "parallel.pp=2 model.tie_word_embeddings=false precision=mixed"),
    ],
)
def test_a_real_step_holds_what_was_rehearsed(run_on_ranks: RankPool, ranks: int, words: str):
    recipe = recipe_for(ranks, *LLAMA, words)
    measured = run_on_ranks(measure, ranks, [*LLAMA, *words.split()])
    for rank in range(ranks):
        told = rehearse(recipe, ranks, rank).memory
        assert told.total == pytest.approx(measured[rank].total, rel=0.02)
        for kind, size in told._asdict().items():
            assert size == pytest.approx(getattr(measured[rank], kind), rel=0.05, abs=1e5), kind


@pytest.mark.parametrize(
    ("count", "degrees", "first", "second"),
    [
        (1, Degrees(), 1, 1),
        (2, Degrees(dp_shard=2), 1, 2),
        (3, Degrees(tp=2), 1, 3),
        (16, Degrees(), 2, 3),
        (3, Degrees(pp=4), 3, 3),
        (8, Degrees(pp=4), 4, 8),
        (9, Degrees(pp=4), 4, 9),
        (16, Degrees(pp=4), 4, 8),
    ],
)
def test_of_many_micro_batches_some_are_rehearsed(count: int, degrees: Degrees, first: int, second: int):
    sizes = [2] * (count - 1) + [1]
    few, enough = rehearsed(sizes, degrees)
    assert (len(few), len(enough)) == (first, second)
    assert few[-1] == enough[-1] == 1


def test_stages_differ_and_their_ranks_do_not():
    assert stage_ranks(Degrees(pp=2, dp_shard=4, tp=2)) == [0, 8]


def test_thousands_of_ranks():
    words = "parallel.dp_shard=-1 train.global_batch_size=4096 train.micro_batch_size=1"
    recipe = recipe_for(4096, *SMALL, words)
    told = rehearse(recipe, 4096, 4095, "neuron")
    degrees = resolve_degrees(recipe.parallel, 4096)
    assert told.collectives == by_group(step_traffic(recipe, degrees, 4095), degrees)


def test_a_plan_that_misses_a_module_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(llama_plan.PLAN, "layers.*.mlp.down_proj")
    said = "rank 0 of 2 would fail: the sharding plan misses the module layers.0.mlp.down_proj"
    with pytest.raises(BadRequest, match=re.escape(said)):
        rehearse(recipe_for(2, *SMALL, "parallel.tp=2"), 2)


def test_shapes_that_do_not_fit_are_one_sentence_that_names_the_module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(llama_plan.PLAN, "layers.*.self_attn.o_proj", "column")
    with pytest.raises(BadRequest, match=r"^rank 1 of 2 would fail: .*, in layers\.0\.self_attn\.o_proj$"):
        rehearse(recipe_for(2, *SMALL, "parallel.tp=2"), 2, 1)


def test_no_process_group_is_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(llama_plan.PLAN, "layers.*.self_attn.o_proj", "column")
    with pytest.raises(BadRequest):
        rehearse(recipe_for(2, *SMALL, "parallel.tp=2"), 2)
    assert not torch.distributed.is_initialized()


def test_what_cannot_fit_is_one_sentence_with_what_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # else each place has a process
    recipe = recipe_for(8, *TINY, *CLUSTER, "parallel.pp=2 train.global_batch_size=16")
    layout = Layout(recipe, resolve_degrees(recipe.parallel, 8))
    record, said = rehearse_and_tell(layout)
    assert said is None
    first, last = record["ranks"]
    assert (first["rank"], last["rank"]) == (0, 4)
    assert first["as_by_arithmetic"]
    assert last["as_by_arithmetic"]
    assert last["memory_ratio"] == pytest.approx(1, abs=0.1)
    assert f"plan=rehearsal rank=4 seconds={last['seconds']:.6g} total={last['memory']['total']}" in (
        printed := capsys.readouterr().out
    )
    assert f"memory_ratio={last['memory_ratio']:.6g} as_by_arithmetic=True" in printed
    # 1 % less than what the larger of the two holds.
    most = max(first["memory"]["total"], last["memory"]["total"])
    small = replace(recipe, cluster=replace(recipe.cluster, memory_gib=0.99 * most / 2**30))
    _, said = rehearse_and_tell(Layout(small, layout.degrees))
    assert said is not None
    assert re.fullmatch(
        r"rank [04] of 8 would hold 0\.0 GiB and has 0\.0, 0\.0 GiB for \w+ and .* would do", said
    )


def test_the_results_are_near_and_the_docs_have_them():
    results = json.loads(RESULTS.read_text())
    for row in results["real"]:
        assert sum(row["rehearsed"].values()) == pytest.approx(sum(row["measured"].values()), rel=0.02), row
    for row in results["large"]:
        assert row["same_collectives"]
        assert sum(row["rehearsed"].values()) == pytest.approx(sum(row["arithmetic"].values()), rel=0.1), row
        for kind, size in row["rehearsed"].items():
            assert size == pytest.approx(row["arithmetic"][kind], rel=0.1, abs=GIB / 10), kind
    page = DOCS.read_text()
    assert page == with_tables(page, results), f"benchmarks/rehearsal.py --docs {DOCS} rewrites it"
