import math
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.trainers.goodput import CAUSES, FOLLOWING, Tally, summary, tally

seconds = st.floats(0, 100, allow_nan=False)


class Life:
    """Writes the marks of a run as its observer does, with a clock of its own."""

    def __init__(self):
        self.now = 1e9
        self.marks = []

    def mark(self, at, after=0.0, **fields):
        self.now += after
        self.marks.append({"t": self.now, "at": at, **fields})

    def process(self, begin=0.0, ready=0.0, step=0, compile=False, **more):
        self.mark("begin", begin, compile=compile, **more)
        self.mark("resume" if step else "start", ready, step=step)

    def step(self, number, took=1.0, data=0.0, between=0.0, **fields):
        self.mark("step", took + between, step=number, step_s=took, data_s=data, **fields)

    def seconds(self):
        return {cause: round(s, 6) for cause, s in tally(self.marks).seconds().items() if round(s, 6)}


def test_a_run_without_trouble():
    run = Life()
    run.process(ready=10)
    for number in (1, 2, 3):
        run.step(number, took=2, data=0.5, between=0.25)
    run.mark("stall", 0.3, stall_s=0.2)
    run.step(4, took=2, between=3, validated=True)
    run.mark("stall", 0.2, stall_s=0.2)
    run.mark("saved", 5)
    run.mark("sample", 1)
    run.mark("stop", 0.5, reason="done")
    assert run.seconds() == {
        "productive": 6.5,
        "data_wait": 1.5,
        "start_up": 10.25,
        "checkpoint_stall": 0.4,
        "validation": 3,
        "saving": 5,
        "other": 2.1,
    }


def test_waiting_for_the_save_before_is_part_of_the_stall():
    run = Life()
    run.process()
    run.step(1)
    run.mark("saved", 3)
    run.mark("stall", 0.5, stall_s=3.25)
    assert run.seconds() == {"productive": 1, "checkpoint_stall": 3.25, "saving": 0.25}


def test_a_rollback_is_no_restart_and_nothing_is_down():
    run = Life()
    run.process(ready=10)
    for number in (1, 2, 3):
        run.step(number)
    run.mark("rollback", 2)
    run.process(begin=3, ready=4, step=1, again=True)
    run.step(2)
    assert run.seconds() == {"productive": 2, "redone_steps": 4, "start_up": 17}
    assert tally(run.marks).restarts == 0
    run.process(begin=5, ready=1, step=1)
    assert run.seconds()["down"] == 5
    assert tally(run.marks).restarts == 1


@pytest.mark.parametrize("rebuilds", [True, False])
def test_a_process_that_dies_after_a_rollback_is_down_until_the_next(rebuilds):
    run = Life()
    run.process(ready=10)
    run.step(1)
    run.mark("rollback", 2)
    if rebuilds:
        run.mark("begin", 3, compile=False, again=True)
    run.process(begin=1000, ready=4)
    run.step(1)
    start_up = 17 if rebuilds else 14
    assert run.seconds() == {"productive": 1, "redone_steps": 3, "start_up": start_up, "down": 1000}
    assert tally(run.marks).restarts == 1


@pytest.mark.parametrize(("compiles", "cause"), [(True, "compile"), (False, "start_up")])
def test_the_first_step_of_a_process_beyond_the_usual(compiles, cause):
    run = Life()
    run.process(compile=compiles)
    run.step(1, took=31)
    assert run.seconds() == {"productive": 31}  # what is usual isn't known yet
    for number in range(2, 60):
        run.step(number)
        assert run.seconds() == {"productive": number, cause: 30}


def test_a_process_that_dies_in_its_first_step_is_held_against_the_one_before():
    run = Life()
    run.process(compile=True)
    for number in (1, 2, 3):
        run.step(number)
    run.process(begin=5, step=3, compile=True)
    run.step(4, took=21)
    run.process(begin=7, step=4, compile=True)
    assert run.seconds() == {"productive": 4, "compile": 20, "down": 12}


def test_steps_that_a_restart_does_again_are_those_beyond_its_checkpoint():
    run = Life()
    run.process(ready=1)
    for number in range(1, 8):
        run.step(number)
    run.process(begin=4, ready=2, step=5)
    run.step(6)
    run.process(begin=4, ready=2, step=5)  # died before a save
    run.step(6)
    run.step(7)
    assert run.seconds() == {"productive": 7, "redone_steps": 3, "start_up": 5, "down": 8}
    found = summary(tally(run.marks))
    assert (found["restarts"], found["steps"], found["wall_s"]) == (2, 7, 23)
    assert found["utilisation"] == pytest.approx(7 / 23, abs=1e-6)


def test_a_start_from_nothing_does_every_step_again():
    run = Life()
    run.process()
    run.step(1)
    run.step(2)
    run.process()
    run.step(1)
    assert run.seconds() == {"productive": 1, "redone_steps": 2}


def test_what_broke_a_run_is_down_and_a_start_that_broke_is_start_up():
    run = Life()
    run.process(ready=3)
    run.mark("stop", 2, reason="RunFailed")
    run.process(begin=1)
    run.step(1)
    run.mark("stop", 60, reason="RuntimeError: a peer is gone")
    assert run.seconds() == {"productive": 1, "start_up": 5, "down": 61}


def test_a_clock_that_was_put_back_takes_nothing():
    run = Life()
    run.process()
    run.step(1)
    run.now -= 3600
    run.process(ready=2, step=1)
    run.step(2)
    assert run.seconds() == {"productive": 2, "start_up": 2}


def test_what_is_no_mark_is_passed_over():
    run = Life()
    run.process()
    run.step(1)
    broken = [
        {"at": "step", "step": 2, "step_s": 1, "data_s": 0},  # no time
        {"t": 1e9 + 5, "at": "step", "step": 2, "step_s": None, "data_s": 0},
        {"t": 1e9 + 5},
    ]
    assert tally([*run.marks, *broken]).seconds() == tally(run.marks).seconds()
    assert summary(Tally())["wall_s"] == 0


@st.composite
def lives(draw):
    """Several processes, each from a step that some earlier one had come to, killed anywhere."""
    run, furthest = Life(), 0
    for _ in range(draw(st.integers(1, 5))):
        resume = draw(st.integers(0, furthest))
        run.mark("begin", draw(seconds), compile=draw(st.booleans()))
        if draw(st.integers(0, 9)) == 0:  # killed while it set up
            continue
        run.mark("resume", draw(seconds), step=resume)
        steps = draw(st.integers(0, 2 * FOLLOWING))
        for number in range(resume + 1, resume + 1 + steps):
            took = draw(seconds)
            run.step(number, took, draw(st.floats(0, took)), draw(seconds), validated=draw(st.booleans()))
            furthest = max(furthest, number)
            if draw(st.integers(0, 5)) == 0:
                run.mark("stall", draw(seconds), stall_s=draw(seconds))
            if draw(st.integers(0, 9)) == 0:
                run.mark("saved", draw(seconds))
    if draw(st.booleans()):
        run.mark("stop", draw(seconds), reason=draw(st.sampled_from(["done", "KeyboardInterrupt"])))
    return run


def slowly(marks):
    """Productive and re-done seconds, found in another way: by looking ahead."""
    processes = []
    for mark in marks:
        if mark["at"] == "begin":
            processes.append((mark["compile"], []))
        processes[-1][1].append(mark)
    resumes = [[m["step"] for m in marks if m["at"] == "resume"] for _, marks in processes]
    productive = redone = 0.0
    usual = None
    for i, (_, marks) in enumerate(processes):
        work = [(m["step"], m["step_s"] - m["data_s"]) for m in marks if m["at"] == "step"]
        following = [took for _, took in work[1 : 1 + FOLLOWING]]
        usual = median(following) if following else usual
        if work and usual is not None:
            work[0] = (work[0][0], min(work[0][1], usual))
        again = min((step for later in resumes[i + 1 :] for step in later), default=math.inf)
        productive += sum(took for step, took in work if step <= again)
        redone += sum(took for step, took in work if step > again)
    return productive, redone


@settings(deadline=None)
@given(lives())
def test_every_second_has_one_cause(run):
    found = tally(run.marks).seconds()
    assert set(found) == set(CAUSES)
    assert sum(found.values()) == pytest.approx(run.marks[-1]["t"] - run.marks[0]["t"], abs=1e-4)
    assert all(value >= -1e-6 for value in found.values())
    productive, redone = slowly(run.marks)
    assert found["productive"] == pytest.approx(productive, abs=1e-4)
    assert found["redone_steps"] == pytest.approx(redone, abs=1e-4)


@settings(deadline=None)
@given(lives())
def test_the_sum_may_be_asked_for_at_any_time(run):
    asked, quiet = Tally(), tally(run.marks)
    for mark in run.marks:
        asked.add(mark)
        asked.seconds()
    assert asked.seconds() == quiet.seconds()
    found = summary(quiet)
    assert found["wall_s"] == pytest.approx(sum(found["seconds"].values()), abs=1e-9)
