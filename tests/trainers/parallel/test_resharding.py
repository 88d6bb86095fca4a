"""A run goes on under another layout as if nothing had happened, and under its own bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.layouts import beyond, differences
from tests.ranks import RankPool
from tests.trainers.parallel.runs import Alone, read, train_and_read, train_until

ALONE = (1, [])
DP_2 = (2, ["parallel.zero=0"])
FSDP_2, FSDP_4 = (2, ["parallel.zero=3"]), (4, ["parallel.zero=3"])
HSDP = (4, ["parallel.dp_replicate=2"])
TP_2, TP_4 = (2, ["parallel.tp=2"]), (4, ["parallel.tp=4"])
FSDP_2_TP_2 = (4, ["parallel.tp=2"])
FOUR_LAYERS, MICRO_BATCHES = "model.num_hidden_layers=4", "train.micro_batch_size=2"
PP_2, PP_2_TP_2 = (2, ["parallel.pp=2"]), (4, ["parallel.pp=2", "parallel.tp=2"])
PP_2_FSDP_2 = (4, ["parallel.pp=2", "parallel.zero=2"])
INTERLEAVED = (2, ["parallel.pp=2", "parallel.pp_schedule=interleaved_1f1b"])
ZERO_BUBBLE = (2, ["parallel.pp=2", "parallel.pp_schedule=zero_bubble"])

CHAINS = {
    "FSDP 2, TP 2, 1 rank, HSDP 2 x 2": ([FSDP_2, TP_2, ALONE, HSDP], []),
    "1 rank, FSDP 2 x TP 2, DP 2, TP 4": ([ALONE, FSDP_2_TP_2, DP_2, TP_4], []),
    "DP 2, 1 rank": ([DP_2, ALONE], []),
    "TP 4, FSDP 4": ([TP_4, FSDP_4], []),
    "mixed: FSDP 2, TP 2, 1 rank, HSDP 2 x 2": ([FSDP_2, TP_2, ALONE, HSDP], ["precision=mixed"]),
    "bf16_sr: FSDP 2, TP 2, 1 rank": ([FSDP_2, TP_2, ALONE], ["precision=bf16_sr"]),
    "tied: FSDP 2 x TP 2, 1 rank, FSDP 4": ([FSDP_2_TP_2, ALONE, FSDP_4], ["model.tie_word_embeddings=true"]),
    "PP 2, 1 rank, TP 2, PP 2": ([PP_2, ALONE, TP_2, PP_2], [MICRO_BATCHES]),
    "PP 2 x FSDP 2, zero bubble, PP 2 x TP 2, FSDP 4": (
        [PP_2_FSDP_2, ZERO_BUBBLE, PP_2_TP_2, FSDP_4],
        [MICRO_BATCHES],
    ),
    "interleaved, PP 2, 1 rank, interleaved": (
        [INTERLEAVED, PP_2, ALONE, INTERLEAVED],
        [FOUR_LAYERS, MICRO_BATCHES],
    ),
    "mixed: PP 2, FSDP 2, 1 rank, PP 2 x FSDP 2": (
        [PP_2, FSDP_2, ALONE, PP_2_FSDP_2],
        ["precision=mixed", MICRO_BATCHES],
    ),
    "six sequences: FSDP 4, 1 rank, FSDP 2": (
        [FSDP_4, ALONE, FSDP_2],
        ["train.global_batch_size=6", "train.micro_batch_size=6"],
    ),
}


QUICK_CHAINS = (
    "DP 2, 1 rank",
    "bf16_sr: FSDP 2, TP 2, 1 rank",
    "PP 2, 1 rank, TP 2, PP 2",
)
SAME = {
    "FSDP 2 x TP 2": (FSDP_2_TP_2, None),  # the precision that `make test` has
    "HSDP 2 x 2": (HSDP, None),
    "PP 2 x FSDP 2": (PP_2_FSDP_2, None),
    "PP 2, zero bubble": (ZERO_BUBBLE, "bf16_sr"),
}


def progress(folder: Path, step: int) -> dict[str, Any]:
    """Of a checkpoint: the counters, and the whole cursor."""
    return json.loads((folder / "checkpoints" / f"step_{step:08}" / "progress.json").read_text())


@pytest.mark.parametrize(
    "chain",
    [pytest.param(name, marks=() if name in QUICK_CHAINS else pytest.mark.slow) for name in CHAINS],
)
def test_a_run_goes_on_under_another_layout(
    run_on_ranks: RankPool, base: list[str], alone: Alone, tmp_path: Path, chain: str
):
    layouts, recipe = CHAINS[chain]
    words = [*base, *recipe, f"run.dir={tmp_path}", "run.name=run"]
    for number, (ranks, overrides) in enumerate(layouts, start=1):
        metrics = run_on_ranks(train_and_read, ranks, [*words, *overrides, f"train.steps={10 * number}"])[0]
        assert len(metrics) == 10 * number
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [(event["event"], event["world_size"]) for event in events if "world_size" in event]
    assert told == [("resume" if number else "start", ranks) for number, (ranks, _) in enumerate(layouts)]

    steps = 10 * len(layouts)
    precision = next((word.partition("=")[2] for word in recipe if word.startswith("precision=")), "fp32")
    found = differences(metrics, alone(*recipe))
    assert beyond(found, precision) == {}, found
    assert progress(tmp_path / "run", steps) == progress(alone.folder(*recipe), steps)


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        pytest.param(
            layout, precision, marks=() if precision == quick else pytest.mark.slow, id=f"{name}-{precision}"
        )
        for name, (layout, quick) in SAME.items()
        for precision in ("fp32", "mixed", "bf16_sr")
    ],
)
def test_the_same_layout_goes_on_bit_for_bit(
    run_on_ranks: RankPool, base: list[str], tmp_path: Path, layout: tuple[int, list[str]], precision: str
):
    ranks, overrides = layout
    words = [*base, *overrides, f"precision={precision}", f"run.dir={tmp_path}", "train.steps=20"]
    words += ["train.micro_batch_size=2", "checkpoint.every=10"]
    whole = run_on_ranks(train_and_read, ranks, [*words, "run.name=whole"])[0]

    stopped = [*words, "run.name=stopped"]
    assert run_on_ranks(train_and_read, ranks, [*stopped, "train.steps=10"])[0] == whole[:10]
    assert run_on_ranks(train_and_read, ranks, stopped)[0] == whole

    run_on_ranks(train_until, ranks, 13, [*words, "run.name=broken"])
    assert len(read(tmp_path / "broken")) == 13
    assert run_on_ranks(train_and_read, ranks, [*words, "run.name=broken"])[0] == whole
    assert progress(tmp_path / "broken", 20) == progress(tmp_path / "whole", 20)
