"""Joining a run and leaving it, once or several times in a launch, and the checkpoints that ranks share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from tests.trainers.checkpoint.saving import save_now
from trainwright.configs.schema import ParallelConfig
from trainwright.errors import BadRequest
from trainwright.trainers.checkpoint import save
from trainwright.trainers.checkpoint.load import read_state
from trainwright.trainers.checkpoint.place import place
from trainwright.trainers.checkpoint.save import step_names
from trainwright.trainers.parallel.ranks import Ranks, open_ranks, this_round
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.progress import Progress


def sums_of_three_runs() -> list[float]:
    """The second of them breaks off."""
    found = []
    for run in range(3):
        try:
            with open_ranks(ParallelConfig(), Cpu()) as ranks:
                found.append(float(ranks.sum(torch.tensor(float(run + ranks.rank)))))
                if run == 1:
                    raise LookupError
        except LookupError:
            pass
    return found


def test_a_launch_may_train_several_times(run_on_ranks):
    assert run_on_ranks(sums_of_three_runs, 3) == [[3.0, 6.0, 9.0]] * 3


def what_two_rounds_have_in_common() -> list[str]:
    found = [this_round()]
    for _ in range(2):
        with open_ranks(ParallelConfig(), Cpu()):
            found.append(this_round())
    return found


def test_the_ranks_of_a_round_know_it_by_what_no_other_has(run_on_ranks):
    one, other = run_on_ranks(what_two_rounds_have_in_common, 2)
    assert one[1:] == other[1:]
    assert len({*one}) == 3


def test_an_environment_that_says_half_is_refused(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(BadRequest, match="WORLD_SIZE=2 is set without RANK"),
        open_ranks(ParallelConfig(), Cpu()),
    ):
        pass


def sharded(ranks: Ranks, elements: int = 2) -> dict[str, torch.Tensor]:
    assert ranks.mesh is not None
    return {"w": DTensor.from_local(torch.ones(elements), ranks.mesh["dp_shard"], [Shard(0)])}


def save_with_a_full_disk_on_one(folder: Path) -> tuple[str, list[str]]:
    def full(*args: object) -> None:
        raise OSError("no space")

    with open_ranks(ParallelConfig(), Cpu()) as ranks:
        progress = Progress(7, 7, np.zeros((1, 1), np.int64))
        save_now(folder, sharded(ranks), progress, ranks)
        with pytest.MonkeyPatch.context() as patch:
            if ranks.rank == 0:
                patch.setattr(save, "write_manifest", full)
            try:
                save_now(folder, sharded(ranks), progress, ranks)
                said = "saved"
            except OSError as error:
                said = str(error)
        ranks.share(None)  # the others look when rank 0 has tidied up
        return said, step_names(place(folder))


def test_a_disk_that_is_full_for_one_rank_is_said_on_all(run_on_ranks, tmp_path: Path):
    assert run_on_ranks(save_with_a_full_disk_on_one, 2, tmp_path) == [("no space", ["step_00000007"])] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def load_another_model(folder: Path) -> None:
    with open_ranks(ParallelConfig(), Cpu()) as ranks:
        progress = Progress(1, 1, np.zeros((1, 1), np.int64))
        path = save_now(folder, sharded(ranks), progress, ranks)
        read_state(path, {"other": sharded(ranks)["w"]}, alone=False)


def test_a_checkpoint_of_another_model_is_a_bad_request_on_all(run_on_ranks, tmp_path: Path):
    for outcome in run_on_ranks.outcomes(load_another_model, 2, tmp_path):
        assert outcome.failure is not None
        assert outcome.failure.type == "BadRequest"
        assert "doesn't fit the model" in outcome.failure.message
    assert "RANK" not in os.environ
