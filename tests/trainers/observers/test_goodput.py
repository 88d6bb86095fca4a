import json
import subprocess
import sys
import time

import pytest

from tests.trainers.observers.conftest import metrics_at, progress_at
from trainwright.configs.schema import Recipe
from trainwright.trainers.observers import goodput
from trainwright.trainers.observers.base import Observers, Run
from trainwright.trainers.observers.console_lines import ConsoleLines
from trainwright.trainers.observers.events_file import EventsFile
from trainwright.trainers.observers.goodput import Goodput, process_start


class Clock:
    """Stands in for the observer's clock."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "_now", clock)
    monkeypatch.setattr(goodput, "_process_is_taken", True)
    return clock


@pytest.fixture
def start(tmp_path, clock):
    def started(resume=0, began=None, others=()):
        observer = Goodput(tmp_path)
        if began is not None:
            observer.began = began
        watching = Observers([observer, *others])
        watching.on_start(Run(Recipe(), tmp_path, 9, 5, 1, watching.emit), progress_at(resume))
        watching.emit("resume", step=resume) if resume else watching.emit("start")
        return watching

    return started


def step(watching, clock, number, seconds=1.0, **more):
    clock.now += seconds
    metrics = metrics_at(number, **{"step_time_s": seconds, "data_time_s": 0.0, **more})
    watching.on_step(progress_at(number), metrics)


def stop(watching, reason="done"):
    watching.emit("stop", step=3, reason=reason)
    watching.on_stop(progress_at(3), reason)


def read(folder):
    return json.loads((folder / "goodput.json").read_text())


def seconds(folder):
    return {cause: value for cause, value in read(folder)["seconds"].items() if value}


def test_a_run_that_is_killed_and_goes_on(tmp_path, clock, start):
    first = start()
    clock.now += 5
    for number in (1, 2, 3):
        step(first, clock, number)
    clock.now += 0.5
    first.emit("checkpoint_begun", step=3, stall_s=0.5)
    step(first, clock, 4)  # and the process is killed
    clock.now += 20
    second = start(resume=3, began=clock.now - 6)
    assert read_ledger(tmp_path)[-2] == {"t": clock.now - 6, "at": "begin", "compile": False}
    step(second, clock, 4, data_time_s=0.25)
    step(second, clock, 5)
    clock.now += 2
    second.emit("checkpoint", step=5, path="somewhere", write_s=2, bytes=9, waited=True)
    stop(second)
    assert seconds(tmp_path) == {
        "productive": 4.75,
        "redone_steps": 1,
        "start_up": 11,
        "data_wait": 0.25,
        "checkpoint_stall": 0.5,
        "saving": 2,
        "down": 14,
    }
    assert read(tmp_path) | {"seconds": 0} == {
        "seconds": 0,
        "wall_s": 33.5,
        "utilisation": round(4.75 / 33.5, 6),
        "restarts": 1,
        "steps": 5,
    }


def read_ledger(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_the_end_is_one_line_on_the_console_and_comes_before_the_stop(tmp_path, clock, start, capsys):
    watching = start(others=[EventsFile(tmp_path), ConsoleLines(100, sys.stdout)])
    for number in (1, 2, 3):
        step(watching, clock, number)
    stop(watching)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-3].startswith("step=3 ")
    assert printed[-2] == "event=goodput utilisation=1 wall_s=3 restarts=0 productive=3"
    assert printed[-1].startswith("event=stop")


def test_a_torn_line_is_passed_over_and_spoils_no_other(tmp_path, clock, start):
    step(start(), clock, 1)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"t": 10')
    clock.now += 10
    watching = start(resume=1)
    step(watching, clock, 2)
    stop(watching)
    assert seconds(tmp_path) == {"productive": 2, "down": 10}


def test_a_process_that_stood_ready_counts_from_the_end_of_the_one_before(tmp_path, clock, start):
    step(start(), clock, 1)
    clock.now += 3
    stop(start(resume=1, began=900.0))
    assert seconds(tmp_path) == {"productive": 1, "start_up": 3}


def test_a_clock_that_was_put_back_gives_no_negative_seconds(tmp_path, clock, start):
    step(start(), clock, 1)
    clock.now -= 500
    watching = start(resume=1, began=clock.now - 4)
    step(watching, clock, 2)
    stop(watching)
    assert seconds(tmp_path) == {"productive": 2, "start_up": 4}


def test_a_save_that_ends_beside_the_training_takes_no_time_from_it(tmp_path, clock, start):
    watching = start()
    step(watching, clock, 1)
    clock.now += 0.5
    watching.emit("checkpoint", step=1, path="", write_s=3, bytes=1, waited=False)
    assert seconds(tmp_path) == {"productive": 1, "other": 0.5}
    assert read_ledger(tmp_path)[-1]["at"] == "written"


def test_the_sums_are_kept_at_each_checkpoint(tmp_path, clock, start):
    watching = start()
    step(watching, clock, 1)
    watching.emit("checkpoint", step=1, path="", write_s=3, bytes=1, waited=True)
    assert seconds(tmp_path) == {"productive": 1}


def test_the_process_began_before_its_imports():
    code = (
        "import time; time.sleep(.3); import trainwright.trainers.observers.goodput as g; a = g.process_start()"
    )
    started = time.time()
    done = subprocess.run([sys.executable, "-c", f"{code}; print(a)"], capture_output=True, text=True)
    assert abs(float(done.stdout) - started) < 0.25
    assert process_start() == pytest.approx(process_start(), abs=0.02)


def test_a_second_run_of_a_process_begins_with_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "_process_is_taken", False)
    first, second = Goodput(tmp_path), Goodput(tmp_path)
    assert first.began < second.began
    assert second.began == pytest.approx(time.time(), abs=1)


def test_a_step_costs_under_a_hundred_microseconds(tmp_path, start):
    watching = start()
    progress, metrics = progress_at(1), metrics_at(1)
    took = []
    for _ in range(2000):
        began = time.perf_counter()
        watching.on_step(progress, metrics)
        took.append(time.perf_counter() - began)
    assert sorted(took)[1000] < 100e-6
