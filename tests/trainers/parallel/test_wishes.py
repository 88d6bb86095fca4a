"""What one rank is asked, all do after the same step."""

import os
import signal
from pathlib import Path

import pytest

from tests.ranks import RankPool
from tests.trainers.parallel.runs import Line, read, train_and_read
from trainwright.configs.compose import load_recipe
from trainwright.errors import Preempted
from trainwright.trainers.observers.base import Metrics, Observer, Progress
from trainwright.trainers.resilience.wishes import Wishes
from trainwright.trainers.train import train


class Notice(Observer):
    """The last rank gets a signal after step 3."""

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        if progress.step == 3 and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            signal.raise_signal(signal.SIGTERM)


def train_until_notice(overrides: list[str]) -> tuple[str, list[Line]]:
    recipe = load_recipe(overrides)
    try:
        train(recipe, [Notice()])
    except Preempted as preempted:
        return str(preempted), read(Path(recipe.run.dir) / str(recipe.run.name))
    raise AssertionError("nobody heeded the signal")


@pytest.mark.parametrize("layout", [(2, []), (4, ["parallel.tp=2"])], ids=["FSDP 2", "FSDP 2 x TP 2"])
def test_all_ranks_save_where_one_is_asked_to_stop(
    run_on_ranks: RankPool, base: list[str], tmp_path: Path, layout: tuple[int, list[str]]
):
    ranks, overrides = layout
    words = [*base, *overrides, "train.steps=8", f"run.dir={tmp_path}", "train.micro_batch_size=2"]
    whole = run_on_ranks(train_and_read, ranks, [*words, "run.name=whole"])[0]

    words.append("run.name=stopped")
    said = run_on_ranks(train_until_notice, ranks, words)
    others = [line.split(" stopped")[0] for line, _ in said[:-1]]
    assert others == ["a signal to another rank"] * (ranks - 1)
    assert said[-1][0].startswith("SIGTERM stopped the run after step 4, which is saved as")
    assert said[0][1] == whole[:4]
    assert run_on_ranks(train_and_read, ranks, words)[0] == whole


def test_a_save_that_is_being_written_is_waited_for():
    wishes = Wishes()
    wishes.save = True
    for busy, agreed in ((1, False), (0, True)):
        wishes.agree(save=1, busy=busy, stop=0)
        assert (wishes.agreed_save, wishes.agreed_stop) == (agreed, False)
