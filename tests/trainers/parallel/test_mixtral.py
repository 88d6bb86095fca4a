"""Data parallelism doesn't change a Mixtral's run: routing is of a micro-batch, and those are the same."""

from pathlib import Path

import pytest

from benchmarks.layouts import differences
from tests.ranks import RankPool
from tests.trainers.parallel.runs import train_and_read, train_until

WORDS = ["model.intermediate_size=256", "train.micro_batch_size=2", "train.steps=12"]
FOUR, THREE = "model.moe.num_local_experts=4", "model.moe.num_local_experts=3"


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ([FOUR], []),
        ([FOUR], ["parallel.zero=0"]),
        ([THREE], ["parallel.zero=2"]),  # three experts on two ranks: each has a part of all
        ([FOUR, "model.moe.load_balancing=sinkhorn"], []),
        ([FOUR, "model.moe.capacity=1.1", "model.moe.load_balancing=none"], []),
        ([FOUR, "train.activation_checkpointing=selective", "train.recompute_keep=[attention]"], []),
    ],
    ids=" ".join,
)
def test_two_ranks_train_as_one(
    run_on_ranks: RankPool, base: list[str], tmp_path: Path, recipe: list[str], layout: list[str]
):
    words = [*base, *WORDS, *recipe, f"run.dir={tmp_path}"]
    (alone,) = run_on_ranks(train_and_read, 1, [*words, "run.name=alone"])
    found = run_on_ranks(train_and_read, 2, [*words, *layout, "run.name=two"])[0]
    assert max(differences(found, alone).values()) < 1e-5
    for line, other in zip(found, alone, strict=True):
        for name in ("expert_load", "router_entropy", "aux_loss", "z_loss", "dropped"):
            assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("experts", [FOUR, THREE])
def test_stochastic_rounding_and_checkpoints_know_stacks_of_matrices(
    run_on_ranks: RankPool, base: list[str], tmp_path: Path, experts: str
):
    words = [*base, *WORDS, experts, f"run.dir={tmp_path}", "precision=bf16_sr", "checkpoint.every=4"]
    (alone,) = run_on_ranks(train_and_read, 1, [*words, "run.name=alone"])
    run_on_ranks(train_until, 2, 6, [*words, "run.name=moved"])
    (moved,) = run_on_ranks(train_and_read, 1, [*words, "run.name=moved"])
    found = differences(moved, alone)
    assert max(found["loss"], found["param_norm"]) < 2e-3
