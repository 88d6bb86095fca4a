"""The device doesn't change the run: the table of layouts, each held against a single process on a CPU."""

from pathlib import Path

import pytest

from benchmarks.layouts import LAYOUTS, Layout, beyond, differences
from tests.neuron_device.processes import SENDS, on_stand_in
from tests.ranks import RankPool
from tests.trainers.parallel.runs import Alone, train_and_read

# What the fast tests take of the table: each way to cut a model once, and each precision.
QUICK = {
    "fp32": ("ZeRO-2 on 2, 4 micro-batches", "HSDP 2 x 2", "TP 2 without SP", "PP 2 x FSDP 2"),
    "mixed": ("FSDP 2 x TP 2",),
    "bf16_sr": ("FSDP 2, 4 micro-batches",),
}


def rows() -> list[object]:
    quick = [(name, precision) for precision, names in QUICK.items() for name in names]
    assert set(quick) <= {(row.name, row.precision) for row in LAYOUTS}
    return [
        pytest.param(
            row,
            id=f"{row.name} {row.precision}",
            marks=() if (row.name, row.precision) in quick else pytest.mark.slow,
        )
        for row in LAYOUTS
    ]


@pytest.mark.parametrize("row", rows())
def test_a_layout_on_the_device_gives_the_curve_of_a_cpu(
    run_on_neuron: RankPool,
    base: list[str],
    alone: Alone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    row: Layout,
):
    monkeypatch.setenv(SENDS, "1" if "parallel.pp" in " ".join(row.overrides) else "0")
    run = ["platform=neuron", "train.steps=5", f"run.dir={tmp_path}", "run.name=run"]
    words = [*base, *run, *row.recipe, *row.overrides]
    metrics = run_on_neuron(on_stand_in, row.ranks, train_and_read, words)[0]
    assert len(metrics) == 5
    found = differences(metrics, alone(*row.recipe))
    assert beyond(found, row.precision) == {}, found
