"""Whole runs on the device: what they compile, what they leave and go on from, and how they end."""

import math
import os
import signal
from pathlib import Path

import pytest

from benchmarks.layouts import beyond, differences
from tests.neuron_device.processes import SENDS, command, on_stand_in
from tests.ranks import RankPool
from tests.trainers.parallel.runs import Alone, train_and_read, train_until
from tests.trainers.poison import poisoned
from trainwright.configs.compose import load_recipe
from trainwright.errors import NumericalFailure, Preempted
from trainwright.trainers.health.check import examine, require
from trainwright.trainers.observers.base import Metrics, Observer, Progress
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.platform.choose import choose_platform
from trainwright.trainers.train import train

ON_NEURON = ["platform=neuron", "train.steps=6"]


class Watch(Observer):
    def __init__(self) -> None:
        from torch_neuronx.counting import compiled

        compiled.clear()
        self.compiled = compiled
        self.before: set[object] = set()
        self.new: list[set[object]] = []

    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        self.new.append(self.compiled - self.before)
        self.before = set(self.compiled)


def compiled_by_step(words: list[str]) -> list[list[str]]:
    """After each step, with the validation and the save that came with it: what was new to the device."""
    import torch_neuronx  # noqa: F401

    train(load_recipe(words), [watch := Watch()])
    return [sorted(map(str, new)) for new in watch.new]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, "train.micro_batch_size=2"),
        (2, "train.micro_batch_size=1 parallel.zero=2"),
        (4, "parallel.tp=2 precision=bf16_sr"),
        (2, "parallel.pp=2 train.micro_batch_size=2 precision=mixed"),
    ],
)
def test_nothing_is_compiled_after_the_second_step(
    run_on_neuron: RankPool,
    base: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    words: str,
):
    monkeypatch.setenv(SENDS, "1")
    often = ["train.steps=8", "train.validate_every=4", "checkpoint.every=3", f"run.dir={tmp_path}"]
    for new in run_on_neuron(on_stand_in, ranks, compiled_by_step, [*base, *ON_NEURON, *often, *words.split()]):
        assert new[0]
        first_validation = 3
        later = [step for number, step in enumerate(new) if number > 1 and number != first_validation]
        assert later == [[]] * 5


@pytest.mark.parametrize(("ranks", "words"), [(2, "precision=bf16_sr"), (2, "parallel.tp=2 precision=mixed")])
def test_a_resumed_run_is_the_same_bit_for_bit(
    run_on_neuron: RankPool, base: list[str], tmp_path: Path, ranks: int, words: str
):
    words = [*base, *ON_NEURON, *words.split(), "checkpoint.every=2", f"run.dir={tmp_path}"]
    whole = run_on_neuron(on_stand_in, ranks, train_and_read, [*words, "run.name=whole"])[0]
    broken = [*words, "run.name=broken"]
    run_on_neuron(on_stand_in, ranks, train_until, 3, broken)
    assert run_on_neuron(on_stand_in, ranks, train_and_read, broken)[0] == whole


def test_a_run_goes_on_in_another_layout_on_another_device(
    run_on_neuron: RankPool, run_on_ranks: RankPool, base: list[str], alone: Alone, tmp_path: Path
):
    words = [*base, "train.steps=6", "checkpoint.every=2", f"run.dir={tmp_path}", "run.name=run"]
    run_on_neuron(on_stand_in, 2, train_until, 3, [*words, "platform=neuron"])
    run_on_ranks(train_until, 2, 5, [*words, "platform=cpu", "parallel.tp=2"])
    metrics = run_on_neuron(on_stand_in, 1, train_and_read, [*words, "platform=neuron"])[0]
    found = differences(metrics, alone())
    assert beyond(found, "fp32") == {}, found


class Signal(Observer):
    def on_step(self, progress: Progress, metrics: Metrics) -> None:
        if progress.step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def preempted(words: list[str]) -> str:
    try:
        train(load_recipe(words), [Signal()])
    except Preempted as error:
        return str(error)
    return "done"


def test_a_run_that_is_preempted_has_saved(run_on_neuron: RankPool, base: list[str], tmp_path: Path):
    words = [*base, *ON_NEURON, f"run.dir={tmp_path}"]
    whole = run_on_neuron(on_stand_in, 2, train_and_read, [*words, "run.name=whole"])[0]
    stopped = [*words, "run.name=stopped"]
    for said in run_on_neuron(on_stand_in, 2, preempted, stopped):
        assert "is saved as" in said
    assert run_on_neuron(on_stand_in, 2, train_and_read, stopped)[0] == whole


def failing_at(step: int, factor: float, words: list[str]) -> str:
    """Rank 1's loss is multiplied in one step, before its sum with the other's."""
    with poisoned({step: factor} if os.environ["RANK"] == "1" else {}):
        try:
            train(load_recipe(words))
        except NumericalFailure as error:
            return str(error)
    return "done"


@pytest.mark.parametrize("factor", [math.inf, math.nan])
@pytest.mark.parametrize("words", ["parallel.zero=3", "parallel.tp=2"])
def test_what_is_not_finite_on_one_rank_is_known_to_all(
    run_on_neuron: RankPool, base: list[str], tmp_path: Path, factor: float, words: str
):
    words = [*base, *ON_NEURON, *words.split(), f"run.dir={tmp_path}"]
    for said in run_on_neuron(on_stand_in, 2, failing_at, 3, factor, words):
        assert "step 3" in said, said


def test_what_cannot_be_compiled_is_refused(run_on_neuron: RankPool, base: list[str], tmp_path: Path):
    words = [*base, *ON_NEURON, "train.compile=true", f"run.dir={tmp_path}"]
    (outcome,) = run_on_neuron.outcomes(on_stand_in, 1, train_and_read, words)
    assert str(outcome.failure) == (
        "BadRequest: train.compile=true: torch.compile has no backend neuron here; use train.compile=false"
    )


def rounding_variables(words: list[str]) -> dict[str, str]:
    train_and_read(words)
    return {name: value for name, value in os.environ.items() if "STOCHASTIC" in name}


def test_the_runtime_is_told_to_round_by_chance(run_on_neuron: RankPool, base: list[str], tmp_path: Path):
    words = [*base, *ON_NEURON, "train.steps=1", "seed=7", f"run.dir={tmp_path}"]
    words += ["precision=bf16_sr", "precision.rounding=hardware"]
    assert run_on_neuron(on_stand_in, 1, rounding_variables, words)[0] == {
        "NEURON_RT_STOCHASTIC_ROUNDING_EN": "1",
        "NEURON_RT_STOCHASTIC_ROUNDING_SEED": "7",
    }


def test_the_command_line_finds_the_device(tiny: list[str], tmp_path: Path):
    sample = "monitor.sample_prompt=the"
    done = command("-m", "trainwright", "train", *tiny, sample, "platform=neuron", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert "neuron stand-in" in (tmp_path / "runs" / "tiny" / "config.yaml").read_text()
    assert '"event": "sample"' in (tmp_path / "runs" / "tiny" / "events.jsonl").read_text()


def health_found(words: list[str]) -> tuple[dict[str, str], str]:
    """What a small health check finds: bad nodes, and what the device calls itself."""
    recipe, platform = load_recipe(words), choose_platform("neuron")
    platform.product_size, platform.buffer_bytes = 64, 1 << 16
    with open_ranks(recipe.parallel, platform) as ranks:
        health = examine(recipe, ranks, platform)
        require(health, ranks)
        return health.bad_nodes(), platform.kind()


def test_its_health_is_checked(run_on_neuron: RankPool, base: list[str], tmp_path: Path):
    words = [*base, *ON_NEURON, "health.memory_gib=0.01", f"run.dir={tmp_path}"]
    for bad, kind in run_on_neuron(on_stand_in, 2, health_found, words):
        assert bad == {}
        assert kind.startswith("neuron stand-in (")
