"""The supervisor over a torchrun that is a few lines: what it ends, starts again, and leaves behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere orphans can't be taken in")

HERE = Path(__file__).parent
PATIENCE = 20.0  # seconds until a test takes what it waits for to never come


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def marked(mark: str) -> list[int]:
    """The processes that have `mark` in their environment, whoever's children they are."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


class Supervised:
    """A supervisor, its torchrun and its worker."""

    def __init__(self, folder: Path, what: str, relaunches=0, shutdown=5.0, patience=60.0, **environment: str):
        self.folder, self.mark = folder, f"MARK={uuid.uuid4()}"
        words = [sys.executable, HERE / "supervising.py", str(relaunches), str(shutdown), str(patience)]
        words += [sys.executable, HERE / "fake_torchrun.py", folder, what]
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            words,
            env={**os.environ, name: value, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def starts(self, who: str) -> list[int]:
        path = self.folder / who
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def up(self) -> None:
        until(lambda: self.starts("torchrun") and self.starts("worker"), "the worker's start")

    def ends(self) -> tuple[int, str]:
        """Exit status and what it says; nothing may be left then."""
        said = self.process.communicate(timeout=PATIENCE)[0].strip()
        assert marked(self.mark) == []
        return self.process.returncode, said


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    made: list[Supervised] = []

    def make(what: str, **options) -> Supervised:
        made.append(Supervised(tmp_path, what, **options))
        return made[-1]

    yield make
    for one in made:
        for pid in marked(one.mark):
            os.kill(pid, signal.SIGKILL)
        one.process.wait()


def test_a_run_that_is_done(supervised):
    assert supervised("0").ends() == (0, "done")


@pytest.mark.parametrize("status", [2, 76, 77])
def test_torchrun_is_ended_where_a_restart_is_useless(supervised, status: int):
    run = supervised(str(status), relaunches=3)
    assert run.ends() == (status, f"rank 0: ended with {status}")
    assert len(run.starts("torchrun")) == 1


def test_torchrun_is_started_again_so_many_times(supervised):
    run = supervised("1", relaunches=2)
    assert run.ends() == (1, "rank 0: ended with 1")
    assert len(run.starts("torchrun")) == 3


def test_torchrun_is_not_started_again_when_it_has_waited_for_others_in_vain(supervised):
    run = supervised("1", relaunches=2, patience=0)
    assert run.ends() == (1, "rank 0: ended with 1")
    assert len(run.starts("torchrun")) == 1


def test_what_ended_the_last_ranks_counts_where_no_other_started(supervised):
    run = supervised("once", relaunches=1)
    assert run.ends() == (75, "saved at step 7")
    assert (len(run.starts("torchrun")), len(run.starts("worker"))) == (2, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_notice_reaches_the_worker_which_saves(supervised, number: signal.Signals):
    run = supervised("wait", relaunches=3)
    run.up()
    run.process.send_signal(number)
    status, said = run.ends()
    assert status == 75
    assert said.startswith(number.name)


def test_the_keyboard_ends_with_130(supervised):
    run = supervised("hang", shutdown=60)
    run.up()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)  # at once now
    assert run.ends() == (130, "interrupted")


def test_a_worker_that_does_not_end_is_killed_when_its_time_is_up(supervised):
    run = supervised("hang", shutdown=0.5)
    run.up()
    run.process.terminate()
    status, said = run.ends()
    assert status == 1
    assert said.startswith("rank 0 ended without a word")


def test_workers_of_a_killed_torchrun_save_and_torchrun_starts_again(supervised):
    run = supervised("wait", relaunches=1)
    run.up()
    os.kill(run.starts("torchrun")[0], signal.SIGKILL)
    until(lambda: len(run.starts("worker")) == 2, "the second worker")
    assert not Path(f"/proc/{run.starts('worker')[0]}").exists()
    os.kill(run.starts("torchrun")[1], signal.SIGKILL)
    assert run.ends() == (1, "torchrun was killed by SIGKILL")


def test_a_killed_supervisor_takes_torchrun_along(supervised):
    run = supervised("wait")
    run.up()
    run.process.kill()
    until(lambda: marked(run.mark) == [], "the end of torchrun and its worker")


def test_torchrun_starts_when_nodes_can_meet(supervised, tmp_path: Path):
    run = supervised("0", WAITS_FOR=str(tmp_path / "host"))
    time.sleep(1)
    assert run.starts("torchrun") == []
    (tmp_path / "host").touch()
    assert run.ends() == (0, "done")


def test_a_notice_while_it_waits_for_the_host(supervised, tmp_path: Path):
    run = supervised("0", WAITS_FOR=str(tmp_path / "host"))
    time.sleep(1)
    run.process.terminate()
    assert run.ends() == (75, "SIGTERM before torchrun had started: run the same command again")


def test_a_notice_between_two_starts(supervised):
    run = supervised("1", relaunches=1, PAUSE="30")
    until(lambda: run.starts("torchrun"), "a start")
    until(lambda: not Path(f"/proc/{run.starts('torchrun')[0]}").exists(), "its end")
    run.process.terminate()
    assert run.ends()[0] == 75


def test_a_notice_while_torchrun_waits_for_other_nodes(supervised):
    run = supervised("lost")
    until(lambda: run.starts("ended"), "the worker's end")
    run.process.terminate()
    assert run.ends() == (75, "SIGTERM while no rank ran: run the same command again")
