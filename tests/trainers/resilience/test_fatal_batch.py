"""What counts as a death of a batch, by files written by hand."""

import json
from collections import Counter
from pathlib import Path

import pytest

from trainwright.trainers.resilience.fatal_batch import earlier_deaths, without


class Files:
    """The files of a run, as it leaves them. Each start goes on from the checkpoint of step 5."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen = []

    def event(self, event: str, **fields: object):
        self._add("events", {"time": "2026-01-01T00:00:00.000Z", "event": event, **fields})

    def begins(self):
        """A start, up to its event, of a run that has come to its checkpoint."""
        deaths = earlier_deaths(self.folder, leave_out=False)
        self.seen.append((deaths.died_in, deaths.twice))
        self.event("resume", step=5, died_in=deaths.died_in)
        self.makes(*range(1, 6), mode="w")

    def makes(self, *steps: int, mode: str = "a"):
        with (self.folder / "metrics.jsonl").open(mode) as file:
            file.writelines(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in steps)

    def tear(self, name: str, text: str):
        with (self.folder / name).open("a") as file:
            file.write(text)

    def _add(self, name: str, record: dict[str, object]):
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Files:
    return Files(tmp_path)


def deaths(run: Files, *words: dict[str, object], steps: tuple[int, ...] = ()) -> list[tuple[int | None, bool]]:
    """What the second and the third start find, after two that made `steps` and left `words`."""
    for _ in range(2):
        run.begins()
        run.makes(*steps)
        for word in words:
            run.event(**word)
    run.begins()
    return run.seen[1:]


def test_a_run_that_never_began_has_no_deaths(run: Files):
    assert earlier_deaths(run.folder, leave_out=True).died_in is None


def test_kills_in_the_start_blame_no_batch(run: Files):
    assert deaths(run) == [(None, False), (None, False)]
    assert not earlier_deaths(run.folder, leave_out=True).left_out


def test_kills_in_the_same_later_step_blame_its_batch(run: Files):
    assert deaths(run, steps=(6, 7)) == [(8, False), (8, True)]
    run.makes(6, 7)
    assert earlier_deaths(run.folder, leave_out=True).left_out == {8: 1}


@pytest.mark.parametrize(
    "word",
    [
        {"event": "stop", "step": 5, "reason": "RunFailed: the batch is too much"},
        {"event": "stop", "step": 5, "reason": "NumericalFailure: step 6 has loss nan"},
        {"event": "hang", "step": 6, "phase": "forward_backward", "reason": "it is in no collective"},
        {"event": "hang", "step": 6, "phase": "agree", "reason": "it is in no collective"},
    ],
    ids=lambda word: f"{word['event']} {word.get('phase', word['reason'])}",
)
def test_a_word_blames_the_batch_of_the_first_step_too(run: Files, word: dict[str, object]):
    assert deaths(run, word) == [(6, False), (6, True)]


@pytest.mark.parametrize(
    "word",
    [
        {"event": "hang", "step": 6, "phase": "data", "reason": "it is in no collective"},
        {"event": "hang", "step": 0, "phase": "start_up", "reason": "all ranks are in the same place"},
        {"event": "stop", "step": 5, "reason": "RuntimeError: [gloo] Connection closed by peer [::1]:4"},
    ],
    ids=lambda word: word.get("phase", "a lost peer"),
)
def test_other_words_blame_none_in_the_first_step(run: Files, word: dict[str, object]):
    assert deaths(run, word) == [(None, False), (None, False)]


@pytest.mark.parametrize(
    "reason",
    [
        "done",
        "Diverged: it has been rolled back 3 times",
        "Preempted: SIGTERM stopped the run",
        "KeyboardInterrupt: ",
    ],
)
def test_an_end_of_its_own_is_no_death(run: Files, reason: str):
    stop = {"event": "stop", "step": 7, "reason": reason}
    assert deaths(run, stop, steps=(6, 7)) == [(None, False), (None, False)]


def test_a_run_that_was_rolled_back_has_not_died_and_leaves_the_batches_out(run: Files):
    rollback = {"event": "rollback", "step": 8, "began": 7}
    assert deaths(run, rollback, steps=(6, 7)) == [(None, False), (None, False)]
    found = earlier_deaths(run.folder, leave_out=False)
    assert (found.left_out, found.rollbacks) == ({7: 4}, 2)


def given(left_out: Counter[int], batches: range) -> list[int]:
    """What the loop does with `left_out`: the batches that steps train on, one after another."""
    left, trained = left_out.copy(), []
    for batch in batches:
        if left[len(trained) + 1]:
            left[len(trained) + 1] -= 1
        else:
            trained.append(batch)
    return trained


@pytest.mark.parametrize(
    "blamed", [[(7, 7)], [(7, 9), (7, 7)], [(30, 31), (27, 28), (29, 29)], [(5, 5), (30, 32)]]
)
def test_a_batch_that_was_left_out_stays_out_whatever_goes_before_it(blamed: list[tuple[int, int]]):
    left_out, bad = Counter[int](), set()
    for first, last in blamed:
        bad |= set(given(left_out, range(1, 60))[first - 1 : last])
        left_out = without(left_out, first, last)
    assert given(left_out, range(1, 60)) == [batch for batch in range(1, 60) if batch not in bad]


def test_torn_lines_are_passed_over(run: Files):
    run.begins()
    run.makes(6, 7)
    run.tear("metrics.jsonl", '{"step": 8, "lo')
    run.tear("events.jsonl", '{"time": "2026-\n')
    assert earlier_deaths(run.folder, leave_out=False).died_in == 8
    run.tear("metrics.jsonl", "\0" * 200_000)
    assert earlier_deaths(run.folder, leave_out=False).died_in == 8


def test_only_the_end_of_the_metrics_is_read(run: Files, monkeypatch: pytest.MonkeyPatch):
    run.begins()
    run.makes(*range(6, 50_000))
    loads, read = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text: [read.append(text), loads(text)][1])
    assert earlier_deaths(run.folder, leave_out=False).died_in == 50_000
    assert len(read) < 10
