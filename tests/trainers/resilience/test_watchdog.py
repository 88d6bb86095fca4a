import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.ranks import RankPool
from trainwright.configs.schema import ParallelConfig, ResilienceConfig
from trainwright.trainers.parallel.ranks import Ranks, open_ranks
from trainwright.trainers.platform.choose import choose_platform
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.resilience import beats, watchdog, whereabouts
from trainwright.trainers.resilience.stacks import all_stacks, collective, place
from trainwright.trainers.resilience.straggler import Beat, Finding, judge
from trainwright.trainers.resilience.watchdog import FOREVER, Watchdog
from trainwright.trainers.resilience.whereabouts import Whereabouts
from trainwright.trainers.within import Unanswered, within

QUICK = ResilienceConfig(hang_factor=2.0, hang_floor_s=0.5, start_up_s=60.0)


def beat(number=5, step=17, phase="agree", waits=True, place="in all_reduce", left=-1.0) -> Beat:
    return Beat(number, 1000.0, step, phase, waits, place, left)


def judged(*pairs: tuple[Beat | None, Beat | None]) -> Finding | None:
    before, after = zip(*pairs, strict=True)
    return judge(before, after, 1058.0)


def alive(**fields) -> tuple[Beat, Beat]:
    return beat(**fields), beat(number=6, **fields)


def test_a_rank_whose_beats_stopped_is_the_straggler():
    found = judged(alive(), (beat(), beat()), alive(step=16, waits=False))
    assert found == Finding(1, "its beats stopped 58 s ago, last seen in step 17 (agree)", [1])


def test_of_several_whose_beats_stopped_it_is_the_one_furthest_behind():
    found = judged(alive(), (beat(), beat()), (None, None), (beat(), beat()))
    assert found
    assert (found.straggler, found.stopped) == (2, [1, 2, 3])
    assert found.why == "it has sent no beat; 2 more have stopped"


def test_else_it_is_a_rank_that_is_in_no_collective():
    found = judged(alive(), alive(waits=False, phase="data", place="at read.py:3 (read)"), alive(step=16))
    assert found == Finding(1, "it is in no collective, but in step 17 (data) at read.py:3 (read)", [])


def test_else_it_is_the_rank_furthest_behind():
    found = judged(alive(), alive(), alive(phase="forward_backward", place="in _send"))
    assert found == Finding(2, "it is the furthest behind, in step 17 (forward_backward), in _send", [])
    assert judged(alive(step=18, phase="forward_backward"), alive()).straggler == 1


def test_ranks_that_are_alike_have_no_straggler():
    assert judged(alive(), alive()) == Finding(None, "all ranks are in the same place, in all_reduce", [])
    found = judged(alive(), alive(place="in broadcast"))
    assert found == Finding(None, "no rank is behind: rank 0 is in all_reduce; rank 1 is in broadcast", [])


def test_a_rank_that_still_has_time_is_waited_for():
    assert judged(alive(), alive(waits=False, phase="observers", left=900.0)) is None
    assert judged(alive(left=1.0), alive(left=1.0)) is None
    # but it doesn't keep a stopped one from being found
    assert judged(alive(left=900.0), (beat(), beat())).straggler == 1


def test_the_whereabouts_remember_how_long_each_phase_took(monkeypatch):
    clock, worked = iter(range(100)), iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    where = Whereabouts(lambda: float(next(worked)))
    for step in (1, 2, 3):
        for phase in ("forward_backward", "data", "agree", "update", "validation", "observers"):
            where.at(phase, step)
            assert where.now[:2] == (phase, step)
    assert list(where.steps) == [4.0, 4.0]  # without validation and observers; the third isn't over
    assert where.took["data"] == 1.0
    assert where.worked["data"] == 10.0


def test_bounds(monkeypatch, tmp_path: Path):
    limits = ResilienceConfig(hang_factor=10.0, hang_floor_s=30.0, start_up_s=1800.0)
    dog = Watchdog(limits, tmp_path, Ranks(), Cpu())
    dog.close()
    assert {dog.bound(phase) for phase in ("start_up", "data", "update", "observers")} == {1800.0}
    dog.where.steps.extend([1.0, 2.0, 100.0])
    assert {dog.bound(phase) for phase in ("data", "agree", "update", "observers")} == {30.0}
    assert {dog.bound(phase) for phase in ("start_up", "validation", "save")} == {1800.0}
    dog.where.steps.extend([100.0, 100.0])
    assert dog.bound("data") == 1000.0


@contextmanager
def elsewhere(code: str, file: str) -> Iterator[int]:
    """A thread that waits in `code`, which says that it stands in `file`."""
    go = threading.Event()
    thread = threading.Thread(target=lambda: exec(compile(code, file, "exec"), {"go": go}), name="in-it")
    thread.start()
    time.sleep(0.1)
    try:
        yield thread.ident
    finally:
        go.set()
        thread.join()


def test_a_thread_in_a_collective_is_told_from_one_that_is_not():
    code = "def all_reduce():\n    go.wait()\nall_reduce()"
    with elsewhere(code, "/x/site-packages/torch/distributed/distributed_c10d.py") as thread:
        assert collective(thread).startswith("in all_reduce for torch/distributed/distributed_c10d.py:2")
        assert all_stacks(thread).startswith("Thread in-it (")
        assert "distributed_c10d.py:2 (all_reduce)\n" in all_stacks(thread)
    with elsewhere(code, "/x/reading.py") as thread:
        assert collective(thread) == ""
        assert place(thread).startswith("at threading.py:")
    code = "def read():\n    go.wait()\nread()"
    with elsewhere(code, "/x/trainwright/trainers/facts.py") as thread:
        assert collective(thread)  # waits for the device, which is in the collective
    code = "def _wait_batch_p2p():\n    go.wait()\n_wait_batch_p2p()"
    with elsewhere(code, "/x/site-packages/torch/distributed/pipelining/schedules.py") as thread:
        assert collective(thread)  # waits for another stage of the pipeline


def test_what_hangs_is_given_up():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    begun = time.monotonic()
    with pytest.raises(Unanswered):
        within(0.1, lambda: time.sleep(2))
    assert time.monotonic() - begun < 1


@pytest.fixture
def alone(monkeypatch, tmp_path: Path) -> Iterator[Callable[..., Watchdog]]:
    """A watchdog of a process on its own, which says that it ends instead of doing so."""
    made = []

    def exit_(status: int) -> None:
        made[0].ended = status
        made[0].close_soon()

    def make(**limits) -> Watchdog:
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setattr(watchdog, "LOOK", 0.05)
        monkeypatch.setattr(watchdog, "PARTING", 0.0)
        dog = Watchdog(ResilienceConfig(**limits), tmp_path, Ranks(), Cpu())
        dog.ended, dog.close_soon = None, dog._closed.set
        made.append(dog)
        monkeypatch.setattr(os, "_exit", exit_)
        return dog

    yield make
    for dog in made:
        dog.close()


def waited(condition: Callable[[], object], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(condition())


def stepped(dog: Watchdog) -> None:
    """Two short steps, so that the bound is that of a step."""
    for step in (1, 2):
        for phase in ("forward_backward", "data", "agree", "update", "observers"):
            dog.where.at(phase, step)
    dog.where.at("forward_backward", 3)


def test_a_process_on_its_own_names_where_it_is_and_ends(alone, tmp_path: Path, capfd):
    dog = alone(hang_floor_s=0.3)
    stepped(dog)
    assert waited(lambda: dog.ended == 1)
    said = capfd.readouterr().err
    assert said.startswith("trainwright: no progress for 0 s in step 3 (forward_backward); it is at ")
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["step"], event["phase"]) == ("hang", 3, "forward_backward")
    dump = (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert "in step 3 (forward_backward) for 0." in dump
    assert "the bound is 0.3 s" in dump
    assert "Thread MainThread" in dump
    assert "test_watchdog.py" in dump


class Clock:
    """Stands in for the module `time` of the watchdog and of the whereabouts: it goes on by hand alone."""

    time, sleep = staticmethod(time.time), staticmethod(time.sleep)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_progress_keeps_it_quiet_and_a_start_has_longer(alone, monkeypatch, tmp_path: Path):
    clock = Clock()
    for module in (watchdog, whereabouts):
        monkeypatch.setattr(module, "time", clock)
    dog = alone(hang_floor_s=0.3, start_up_s=60.0)
    looks: list[float] = []
    monkeypatch.setattr(dog, "_set_timer", looks.append)

    def passes(seconds: float) -> None:
        """So many seconds pass, and the thread has looked since; where it has found a hang, it has ended."""
        clock.now += seconds
        before = len(looks)
        assert waited(lambda: len(looks) >= before + 3 or dog.ended, 30.0)

    for _ in range(3):  # start-up; more at once would count as a machine's sleep
        passes(4.0)
    stepped(dog)
    for _ in range(6):
        passes(0.25)
        dog.where.at("data", 3)
    for phase in ("validation", "save"):
        dog.where.at(phase, 3)
        passes(4.0)
        passes(4.0)
    assert dog.ended is None
    assert not (tmp_path / "stacks").exists()
    dog.where.at("data", 3)
    passes(0.35)
    assert dog.ended == 1


def test_a_suspended_process_begins_anew(alone, monkeypatch):
    dog = alone(hang_floor_s=1.0)
    stepped(dog)
    monkeypatch.setattr(watchdog, "LATE", -0.1)  # as if every look came too late
    time.sleep(1.5)
    assert dog.ended is None
    monkeypatch.setattr(watchdog, "LATE", 5.0)
    assert waited(lambda: dog.ended == 1)


def test_a_debugger_has_all_the_time(alone, monkeypatch, tmp_path: Path):
    dog = alone(hang_floor_s=0.2)
    stepped(dog)

    exec(compile("time.sleep(0.8)", "/x/python3/pdb.py", "exec"), {"time": time})
    dog.close()
    assert dog.ended is None
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    traced = Watchdog(QUICK, tmp_path, Ranks(), Cpu())
    traced.close()
    assert traced.left(traced.where.now) == FOREVER


@pytest.mark.slow
def test_a_main_thread_stuck_in_c_with_pythons_lock_ends(tmp_path: Path):
    program = (
        "import ctypes, time\nfrom pathlib import Path\n"
        "from tests.trainers.resilience.test_watchdog import QUICK, stepped\n"
        "from trainwright.trainers.parallel.ranks import Ranks\n"
        "from trainwright.trainers.platform.cpu import Cpu\n"
        "from trainwright.trainers.resilience import watchdog\n"
        "watchdog.LOOK = watchdog.MARGIN = 0.5\n"
        f"dog = watchdog.Watchdog(QUICK, Path({str(tmp_path)!r}), Ranks(), Cpu())\n"
        "stepped(dog)\ntime.sleep(0.3)\nprint('stuck', flush=True)\nctypes.PyDLL(None).sleep(60)\n"
    )
    environment = {**os.environ, "RANK": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stdout) == (1, "stuck\n")
    assert "most recent call first" in (tmp_path / "stacks" / "rank_00000.txt").read_text()


# On ranks.


@contextmanager
def watched(folder: Path, **limits: float) -> Iterator[tuple[Ranks, Watchdog]]:
    beats.BEAT = watchdog.LOOK = 0.3
    watchdog.PARTING = 1.0
    platform = choose_platform("cpu")
    with open_ranks(ParallelConfig(), platform) as ranks:
        with Watchdog(ResilienceConfig(hang_floor_s=1.0, **limits), folder, ranks, platform) as where:
            for step in range(1, 6):
                where.at("forward_backward", step)
                time.sleep(0.1)
                where.at("agree", step)
                ranks.sum(torch.ones(1))
            where.at("data", 6)
            yield ranks, where
        beats.BEAT, watchdog.LOOK, watchdog.PARTING = 2.0, 1.0, 2.0


def hang_outside(folder: Path) -> None:
    with watched(folder, hang_factor=2.0) as (ranks, where):
        if ranks.rank == 2:
            time.sleep(60)
        where.at("agree", 6)
        ranks.sum(torch.ones(1))


@pytest.mark.slow
def test_all_ranks_end_and_one_names_the_one_that_the_others_wait_for(run_on_ranks: RankPool, tmp_path: Path):
    outcomes = run_on_ranks.outcomes(hang_outside, 3, tmp_path, timeout=60)
    assert [str(outcome.failure) for outcome in outcomes] == ["Died: exit code 1"] * 3
    said = [line for o in outcomes for line in o.stderr.splitlines() if line.startswith("trainwright:")]
    (line,) = said
    assert "s in step 6 (" in line
    assert "; rank 2 straggles: it is in no collective, but in step 6 (data) at " in line
    assert line.endswith(f"; stacks are in {tmp_path / 'stacks'}")
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["straggler"]) == ("hang", 2)
    texts = [(tmp_path / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in range(3)]
    assert ["in all_reduce for " in text.split("found:")[0] for text in texts] == [True, True, False]
    assert all(line.removeprefix("trainwright: ") in text for text in texts)


def wait_for_a_slow_save(folder: Path) -> float:
    with watched(folder, hang_factor=2.0, start_up_s=60.0) as (ranks, where):
        begun = time.monotonic()
        if ranks.rank == 0:
            where.at("save", 6)
            time.sleep(6)
        where.at("agree", 6)
        ranks.sum(torch.ones(1))
    return time.monotonic() - begun


def test_ranks_wait_for_one_that_still_has_time(run_on_ranks: RankPool, tmp_path: Path):
    assert min(run_on_ranks(wait_for_a_slow_save, 2, tmp_path)) > 5
    assert list(tmp_path.iterdir()) == []


def fail(folder: Path) -> None:
    with watched(folder):
        raise ValueError("not a hang")


def test_a_watchdog_leaves_nothing_behind(run_on_ranks: RankPool, tmp_path: Path):
    before = threading.active_count()
    with Watchdog(QUICK, tmp_path, Ranks(), Cpu()):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    outcomes = run_on_ranks.outcomes(fail, 2, tmp_path, timeout=30)
    assert {outcome.failure.type for outcome in outcomes} == {"ValueError"}
    assert list(tmp_path.iterdir()) == []
