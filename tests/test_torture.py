"""A run that is broken at random points ends as if nothing had been; `benchmarks/torture.py` does it longer."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.torture import Undone, compare, torture


@pytest.fixture
def draw() -> random.Random:
    """Other faults each time, which the printed seed brings back."""
    seed = random.randrange(2**32)
    print(f"seed={seed}")
    return random.Random(seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds",
    [
        ["kill", "kill_in_save", "kill_in_load", "term"],
        ["flip_a_bit", "tear", "fill_the_disk", "stop"],
    ],
    ids=",".join,
)
def test_a_tortured_run_equals_an_undisturbed_one(kinds: list[str], tmp_path: Path, draw: random.Random):
    seen = torture(tmp_path, len(kinds), 2, draw, [], kinds)
    assert seen["faults"] == len(kinds)


@pytest.mark.slow
def test_so_does_one_with_tensor_parallel_ranks_whose_data_is_cut(tmp_path: Path, draw: random.Random):
    kinds = ["cut_the_data", "kill_the_supervisor", "flip_a_bit"]
    assert torture(tmp_path, 3, 2, draw, ["parallel.tp=2"], kinds)["faults"] == 3


def leave(folder: Path, loss: float = 2.5, tokens: int = 90, weight: float = 1.0) -> Path:
    """What compare reads of a run."""
    checkpoint = folder / "checkpoints" / "step_00000009"
    checkpoint.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 9, "loss": loss, "step_time_s": id(folder)}) + "\n"
    )
    (checkpoint / "progress.json").write_text(json.dumps({"step": 9, "tokens": tokens, "cursor": [[1, 2]]}))
    save({"w": torch.full((2,), weight)}, storage_writer=FileSystemWriter(checkpoint / "state"), no_dist=True)
    return folder


def test_runs_are_held_to_the_same_metrics_progress_and_tensors(tmp_path: Path):
    whole = leave(tmp_path / "whole")
    compare(whole, leave(tmp_path / "same"))
    for number, (other, said) in enumerate(
        (({"loss": 2.6}, "has {"), ({"tokens": 91}, "is at {"), ({"weight": 2.0}, "differ in"))
    ):
        with pytest.raises(Undone, match=said):
            compare(whole, leave(tmp_path / str(number), **other))
