from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainwright.trainers.checkpoint.load import newest_whole, read_progress, read_state
from trainwright.trainers.checkpoint.manifest import fault
from trainwright.trainers.checkpoint.save import list_checkpoints, save_checkpoint
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.progress import Progress


def save(folder: Path, step: int, keep: int = 2) -> Path:
    state = {"model": {"w": torch.full((3,), float(step))}}
    progress = Progress(step, 7 * step, np.array([[step]]))
    return save_checkpoint(folder, state, progress, "seed: 0\n", Ranks(), keep=keep)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(folder)]


def test_what_was_saved_comes_back(tmp_path: Path):
    path = save(tmp_path, 5)
    state = {"model": {"w": torch.zeros(3)}}
    read_state(path, state, alone=True)
    assert torch.equal(state["model"]["w"], torch.full((3,), 5.0))
    progress = read_progress(path)
    assert (progress.step, progress.tokens, progress.cursor.tolist()) == (5, 35, [[5]])


def test_the_newest_stay(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert steps(tmp_path) == [3, 4]


def test_a_damaged_later_one_goes_before_a_good_one(tmp_path: Path):
    for step in (100, 200):
        save(tmp_path, step)
    (tmp_path / "step_00000200" / "manifest.json").unlink()
    save(tmp_path, 150, keep=1)
    assert steps(tmp_path) == [150]


def test_the_same_step_may_be_saved_again(tmp_path: Path):
    save(tmp_path, 3)
    path = save(tmp_path, 3)
    assert fault(path) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize(
    ("harm", "wrong"),
    [
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest"),
        (lambda path: (path / "manifest.json").write_text("{"), "its manifest can't be read"),
        (lambda path: (path / "progress.json").unlink(), "progress.json is missing"),
        (lambda path: (path / "progress.json").write_text("{}"), "progress.json is damaged"),
        (lambda path: (path / "state" / "__0_0.distcp").write_bytes(b""), "state/__0_0.distcp is damaged"),
    ],
)
def test_damage_is_named_and_passed_over(harm: Callable[[Path], object], wrong: str, tmp_path: Path):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    harm(bad)
    said = []
    assert newest_whole(tmp_path, lambda *fault: said.append(fault)) == good
    assert said == [(bad, wrong)]
