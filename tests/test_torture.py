"""A run that is broken at random points ends as if nothing had been; `benchmarks/torture.py` does it longer."""

import random
from pathlib import Path

import pytest

from benchmarks.torture import torture

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "kinds",
    [
        ["kill", "kill_in_save", "kill_in_load", "term"],
        ["flip_a_bit", "tear", "fill_the_disk", "stop"],
    ],
    ids=",".join,
)
def test_a_tortured_run_equals_an_undisturbed_one(kinds: list[str], tmp_path: Path):
    seen = torture(tmp_path, len(kinds), 2, random.Random(), [], kinds)
    assert seen["faults"] == len(kinds)


def test_so_does_one_with_tensor_parallel_ranks_whose_data_is_cut(tmp_path: Path):
    kinds = ["cut_the_data", "kill_the_supervisor", "flip_a_bit"]
    assert torture(tmp_path, 3, 2, random.Random(), ["parallel.tp=2"], kinds)["faults"] == 3
