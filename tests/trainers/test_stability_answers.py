"""Trouble put into real runs, and what is done about it."""

import json
import math
import signal
import threading
from pathlib import Path

import pytest
from torch import Tensor

from tests.ranks import RankPool
from tests.trainers.parallel.runs import Line, read
from tests.trainers.poison import poisoned
from trainwright.cli import main
from trainwright.configs.compose import load_recipe
from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.checkpoint.save import Saver
from trainwright.trainers.observers.checkpoint import Checkpoints
from trainwright.trainers.steppers.eager import EagerStepper
from trainwright.trainers.train import train

ALL = list(range(1, 19))


@pytest.fixture
def words(tiny: list[str]) -> list[str]:
    """Spikes show from the fifth step on, whatever tiny batches do by themselves."""
    return [
        *tiny,
        *("train.steps=18", "checkpoint.every=5", "train.validate_every=null", "health.check=false"),
        *("stability.window=4", "stability.margin=50", "stability.drift=1e9"),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny"


def events(folder: Path, *names: str) -> list[dict]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "time"} for line in lines if line["event"] in names]


def warnings(folder: Path) -> list[tuple[int, str, str]]:
    return [(event["step"], event["finding"], event["answer"]) for event in events(folder, "warning")]


def run(words: list[str], factors: dict[int, float]) -> tuple[int, list[int]]:
    """The exit status, and the numbers of the batches that were trained on."""
    with poisoned(factors) as trained:
        return main(["train", *words]), trained


def test_a_spike_is_told_and_nothing_else_happens(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(words, {8: 1e3, 9: 1e3}) == (0, ALL)
    (spike,) = events(folder, "spike")
    assert (spike["step"], spike["length"]) == (8, 2)
    norms = {line["step"]: line["grad_norm"] for line in read(folder)}
    assert spike["height"] == max(norms[8], norms[9])
    assert spike["mean"] == pytest.approx(sum(norms[step] for step in range(4, 8)) / 4)
    assert warnings(folder) == []
    assert "event=spike step=8 length=2" in capsys.readouterr().out


def test_a_skipped_step_leaves_the_weights_and_counts(words: list[str], folder: Path):
    assert run([*words, "stability.on_spike=skip"], {8: 1e3, 9: 1e3}) == (0, ALL)
    assert warnings(folder) == [(8, "spike", "skip"), (9, "spike", "skip")]
    lines = read(folder)
    assert [line["step"] for line in lines] == ALL
    params = [line["param_norm"] for line in lines]
    assert params[7] == params[8] == params[9]  # each is that before the step's update
    assert params[6] != params[7]
    assert params[9] != params[10]


def test_a_skipped_batch_with_nan_leaves_a_run_that_goes_on(words: list[str], folder: Path):
    assert run([*words, "stability.on_nonfinite=skip"], {3: math.nan}) == (0, ALL)
    assert warnings(folder) == [(3, "nonfinite", "skip")]
    assert [line["step"] for line in read(folder) if line["loss"] is None] == [3]


def rolled_back(words: list[str], folder: Path, trained: list[int], out: list[int], to: int) -> None:
    """Hold a run that was rolled back once against one that has left out the same batches from the start."""
    (back,) = events(folder, "rollback")
    assert (back["began"], back["step"]) == (out[0], out[-1])
    assert trained == [*range(1, out[-1] + 1), *(n for n in range(to + 1, 19 + len(out)) if n not in out)]
    lines = read(folder)
    assert [line["step"] for line in lines] == ALL

    other = folder.with_name("other")
    other.mkdir()
    (other / "events.jsonl").write_text(json.dumps({"event": "rollback", **back}) + "\n")
    with poisoned({}) as its:
        assert main(["train", *words, "run.name=other"]) == 0
    assert its == [n for n in range(1, 19 + len(out)) if n not in out]
    assert lines == read(other)


def test_a_rollback_goes_on_past_the_batch(words: list[str], folder: Path):
    words = [*words, "stability.on_spike=rollback"]
    status, trained = run(words, {8: 1e3})
    assert status == 0
    assert warnings(folder) == [(8, "spike", "rollback")]
    assert [event["step"] for event in events(folder, "resume")] == [5]
    assert len(events(folder, "start")) == 1
    rolled_back(words, folder, trained, [8], to=5)


def test_a_rollback_leaves_out_all_batches_of_a_persistent_spike(words: list[str], folder: Path):
    """Checkpoints made in it go; the one from before it stays until it is over, also with checkpoint.keep=1."""
    words = [*words, "stability.on_persistent=rollback", "stability.persistent=5", "checkpoint.keep=1"]
    words += ["checkpoint.every=3"]
    status, trained = run(words, dict.fromkeys(range(8, 14), 1e3))
    assert status == 0
    saved = [event["step"] for event in events(folder, "checkpoint")]
    assert saved[:4] == [3, 6, 9, 12]
    assert [event["step"] for event in events(folder, "resume")] == [6]
    assert [(e["step"], e["length"]) for e in events(folder, "spike")] == [(8, 6)]
    rolled_back(words, folder, trained, list(range(8, 14)), to=6)


def test_before_the_first_checkpoint_a_rollback_goes_to_the_beginning(words: list[str], folder: Path):
    words = [*words, "stability.on_nonfinite=rollback"]
    status, trained = run([*words, "resume=none"], {3: math.nan})
    assert status == 0
    assert not folder.with_name("tiny.1").exists()
    assert len(events(folder, "initial_norm")) == 1
    rolled_back(words, folder, trained, [3], to=0)


def test_a_notice_in_the_step_that_is_rolled_back_ends_the_run_at_once(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    words = [*words, "stability.on_spike=rollback"]
    squares, noticed = EagerStepper.squares, []

    def with_notice(stepper: EagerStepper) -> Tensor:
        noticed.append(True)
        if len(noticed) == 8:
            signal.raise_signal(signal.SIGTERM)
        return squares(stepper)

    monkeypatch.setattr(EagerStepper, "squares", with_notice)
    status, trained = run(words, {8: 1e3})
    assert (status, trained) == (75, list(range(1, 9)))
    assert saved(folder) == [5]
    back, stop = events(folder, "rollback", "stop")
    assert (back["began"], stop["event"]) == (8, "stop")
    assert stop["reason"].startswith("Preempted: SIGTERM stopped the run, which has been rolled back")
    status, again = run(words, {8: 1e3})
    assert status == 0
    rolled_back(words, folder, trained + again, [8], to=5)


def test_a_later_start_still_leaves_the_batches_out(words: list[str], folder: Path):
    words = [*words, "stability.on_spike=rollback"]
    assert run([*words, "train.steps=9"], {8: 1e3})[0] == 0
    for path in (folder / "checkpoints").iterdir():
        if path.name != "step_00000005":
            path.rename(folder / path.name)
    status, trained = run([*words, "train.steps=12"], {})
    assert (status, trained) == (0, [6, 7, *range(9, 14)])


def test_rollbacks_have_an_end(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]):
    words = [*words, "stability.on_spike=rollback", "stability.rollbacks=2"]
    assert run(words, dict.fromkeys(range(8, 18), 1e3))[0] == 76
    assert [event["step"] for event in events(folder, "rollback")] == [8, 8]
    assert warnings(folder)[-1] == (8, "rollbacks", "stop")
    assert "rolled back stability.rollbacks=2 times" in capsys.readouterr().err
    # Nor does a new start begin to count again.
    assert run(words, dict.fromkeys(range(8, 18), 1e3))[0] == 76
    assert len(events(folder, "rollback")) == 2
    assert run([*words, "stability.rollbacks=99"], dict.fromkeys(range(8, 18), 1e3))[0] == 0


def test_a_rollback_never_throws_the_last_checkpoint_away(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*words, "stability.on_spike=rollback", "checkpoint.every=3"]
    assert run([*words, "train.steps=9"], {})[0] == 0
    (folder / "checkpoints" / "step_00000006").rename(folder / "step_6")
    # The spike of step 8 is in the metrics, as if it had been there all the time.
    metrics = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines[7:]:
        line["grad_norm"] *= 1e3
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(words, {10: 1e3})[0] == 76
    assert "no whole checkpoint from before step 8 is left" in capsys.readouterr().err
    assert saved(folder) == [9]


def damage(checkpoint: Path) -> None:
    """Flip a bit of its largest file."""
    path = max((checkpoint / "state").iterdir(), key=lambda file: file.stat().st_size)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").iterdir())


def test_a_damaged_checkpoint_is_none_to_roll_back_to(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
):
    """Of 3, 6 and 9 only 3 is from before the spike."""
    words = [*words, "stability.on_persistent=rollback", "stability.persistent=4", "checkpoint.keep=9"]
    words += ["checkpoint.every=3"]
    factors = dict.fromkeys(range(6, 12), 1e3)
    assert run([*words, "train.steps=9", "optim.decay_steps=18"], factors)[0] == 0
    damage(folder / "checkpoints" / "step_00000003")
    assert run(words, factors)[0] == 76
    assert "no whole checkpoint from before step 6 is left" in capsys.readouterr().err
    assert saved(folder) == [3, 6, 9]


def test_trouble_from_before_the_first_checkpoint_goes_back_to_the_beginning(words: list[str], folder: Path):
    words = [*words, "stability.on_persistent=rollback", "stability.persistent=4", "checkpoint.every=7"]
    status, trained = run(words, dict.fromkeys(range(6, 11), 1e3))
    assert status == 0
    rolled_back(words, folder, trained, list(range(6, 11)), to=0)


@pytest.mark.parametrize("whole", [True, False])
def test_a_checkpoint_that_resume_names_is_one_to_roll_back_to(words: list[str], folder: Path, whole: bool):
    named = folder.with_name("named") / "checkpoints" / "step_00000003"
    assert run([*words, "run.name=named", "train.steps=3", "optim.decay_steps=18"], {})[0] == 0
    words = [*words, f"resume={named}", "stability.on_persistent=rollback", "stability.persistent=4"]
    factors = dict.fromkeys(range(8, 13), 1e3)
    assert run([*words, "train.steps=9", "checkpoint.every=9", "optim.decay_steps=18"], factors)[0] == 0
    if not whole:
        damage(named)
    status, trained = run([*words, "checkpoint.every=9"], factors)
    assert status == (0 if whole else 76)
    assert trained[:3] == [10, 11, 12]
    assert trained[3:] == ([*range(4, 8), *range(13, 24)] if whole else [])
    assert (9 in saved(folder)) or whole


def train_on_a_disk_that_keeps(overrides: list[str], factors: dict[int, float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Place, "remove", refuse)
        train_poisoned(overrides, factors)


def refuse(place: Place) -> None:
    raise OSError(30, "Read-only file system")


def test_what_cannot_be_deleted_ends_all_ranks_alike(run_on_ranks: RankPool, words: list[str], folder: Path):
    words = [*words, "stability.on_persistent=rollback", "stability.persistent=4", "checkpoint.every=5"]
    words += ["train.micro_batch_size=1"]
    factors = dict.fromkeys(range(8, 14), 1e3)
    run_on_ranks(train_poisoned, 2, [*words, "train.steps=10", "optim.decay_steps=18"], factors)
    failures = [o.failure for o in run_on_ranks.outcomes(train_on_a_disk_that_keeps, 2, words, factors)]
    for failure in failures:
        assert failure is not None
        assert failure.type == "RunFailed"
        assert "from step 8 on couldn't be deleted ([Errno 30] Read-only file system)" in failure.message
    assert events(folder, "rollback") == []


def test_a_spike_may_stop_the_run(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run([*words, "stability.on_spike=stop"], {8: 1e3})[0] == 76
    assert "step 8 has gradient norm" in capsys.readouterr().err
    assert [event["length"] for event in events(folder, "spike")] == [1]
    assert len(read(folder)) == 7


def test_the_ledger_has_what_a_rollback_cost(words: list[str], folder: Path):
    assert run([*words, "stability.on_spike=rollback"], {8: 1e3})[0] == 0
    goodput = json.loads((folder / "goodput.json").read_text())
    assert (goodput["steps"], goodput["restarts"]) == (18, 0)
    marks = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    at = [mark["at"] for mark in marks]
    back = at.index("rollback")
    redone = [mark["step_s"] - mark["data_s"] for mark in marks if mark["at"] == "step"][5:7]
    wrong = marks[back]["t"] - marks[back - 1]["t"]
    assert goodput["seconds"]["redone_steps"] == pytest.approx(sum(redone) + wrong, abs=1e-4)
    assert goodput["seconds"]["down"] == 0.0
    assert [each for each in at[back:] if each != "saved"][:3] == ["rollback", "begin", "resume"]


def test_a_save_that_a_rollback_waits_for_does_not_take_the_wrong_step(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    forget, written = Saver._forget, threading.Event()

    def slow(saver: Saver, *args: object) -> None:
        assert written.wait(60)
        forget(saver, *args)

    def settle(checkpoints: Checkpoints) -> None:
        written.set()
        checkpoints._hear(wait=True)

    monkeypatch.setattr(Saver, "_forget", slow)
    monkeypatch.setattr(Checkpoints, "settle", settle)
    assert run([*words, "stability.on_spike=rollback", "checkpoint.every=7"], {8: 1e3})[0] == 0
    at = [json.loads(line)["at"] for line in (folder / "ledger.jsonl").read_text().splitlines()]
    back = at.index("rollback")
    assert at[back : back + 4] == ["rollback", "saved", "begin", "resume"]


def test_a_restart_knows_the_spike_that_it_is_in(words: list[str], folder: Path):
    """The norm's mean, too, is that of the steps before: here a skipped update tells."""
    words = [*words, "stability.on_spike=skip", "checkpoint.every=1"]
    factors = dict.fromkeys((9, 10, 11), 1e3)
    assert run([*words, "run.name=whole"], factors)[0] == 0
    for steps in (8, 10, 18):
        assert run([*words, f"train.steps={steps}", "optim.decay_steps=18"], factors)[0] == 0
    whole, ours = read(folder.with_name("whole")), read(folder)
    assert [line["grad_norm"] for line in ours] == [line["grad_norm"] for line in whole]
    assert [(e["step"], e["length"]) for e in events(folder, "spike")][-1] == (9, 3)


def train_poisoned(overrides: list[str], factors: dict[int, float]) -> list[Line]:
    recipe = load_recipe(overrides)
    with poisoned(factors):
        train(recipe)
    return read(Path(recipe.run.dir) / str(recipe.run.name))


@pytest.mark.parametrize("answer", ["skip", "rollback"])
def test_all_ranks_answer_alike(run_on_ranks: RankPool, words: list[str], folder: Path, answer: str):
    words = [*words, f"stability.on_spike={answer}", "train.micro_batch_size=1"]
    alone = run_on_ranks(train_poisoned, 1, [*words, "run.name=alone"], {8: 1e3})[0]
    ours = run_on_ranks(train_poisoned, 2, words, {8: 1e3})[0]
    assert [line["step"] for line in ours] == ALL
    assert [line["tokens"] for line in ours] == [line["tokens"] for line in alone]
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in alone], rel=1e-4)
    assert warnings(folder) == [(8, "spike", answer)]
