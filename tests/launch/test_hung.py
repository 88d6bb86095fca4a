import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainwright import verdict
from trainwright.launch.endings import Verdicts, how_it_ended
from trainwright.launch.hung import LOOKS, LOOKS_FOR_STACKS, Hung

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGUSR2")

WORKER = """
import time
from trainwright import verdict
verdict.begin()
verdict.promise({0})
print("there", flush=True)
time.sleep(60)
"""
Start = Callable[[float], subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv(verdict.FOLDER, str(tmp_path))
    started = []

    def worker(seconds: float) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", WORKER.format(seconds)]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout
        assert started[-1].stdout.readline() == "there\n"
        return started[-1]

    yield worker
    for process in started:
        process.kill()
        process.communicate()


def deadline(folder: Path) -> Path:
    (path,) = folder.glob(f"*{verdict.DEADLINE}")
    return path


def test_a_stopped_worker_is_killed_and_its_end_explained(start: Start, tmp_path: Path, capsys):
    worker, hung = start(0.05), Hung(tmp_path)
    worker.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    for _ in range(LOOKS + LOOKS_FOR_STACKS):
        assert worker.poll() is None
        hung.look()
    assert worker.wait(10) == -signal.SIGKILL
    why = "rank 0 and its watchdog stopped answering, and it was killed"
    assert capsys.readouterr().err == f"trainwright: {why}\n"
    assert how_it_ended(1, Verdicts(tmp_path), None) == (1, why)


@pytest.mark.parametrize("left", ["", None])
def test_it_is_killed_even_if_nothing_can_be_said(start: Start, tmp_path: Path, left: str | None):
    worker, hung = start(-1.0), Hung(tmp_path)
    (said,) = tmp_path.glob("*.json")
    said.unlink() if left is None else said.write_text(left)
    worker.send_signal(signal.SIGSTOP)
    for _ in range(LOOKS + LOOKS_FOR_STACKS):
        hung.look()
    assert worker.wait(10) == -signal.SIGKILL


def test_a_late_worker_is_first_asked_for_its_stacks(start: Start, tmp_path: Path):
    worker, hung = start(-1.0), Hung(tmp_path)
    for _ in range(LOOKS):
        hung.look()
    assert worker.wait(10) == -signal.SIGUSR2  # it writes none


def test_a_worker_that_promises_again_is_let_be(start: Start, tmp_path: Path):
    worker, hung = start(-1.0), Hung(tmp_path)
    for _ in range(3):  # as after a sleep of the machine
        for _ in range(LOOKS - 1):
            hung.look()
        os.utime(deadline(tmp_path), (0, time.monotonic() + 60))
        hung.look()
        os.utime(deadline(tmp_path), (0, time.monotonic() - 1))
    assert worker.poll() is None


def test_a_worker_that_has_ended_is_forgotten(start: Start, tmp_path: Path):
    worker, hung = start(-1.0), Hung(tmp_path)
    worker.kill()
    worker.wait()
    hung.look()
    assert not list(tmp_path.glob(f"*{verdict.DEADLINE}"))


def test_a_promise_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(verdict.FOLDER, str(tmp_path))
    verdict.promise(5.0)
    assert time.monotonic() + 4 < deadline(tmp_path).stat().st_mtime < time.monotonic() + 6
    verdict.promise_no_more()
    assert not list(tmp_path.iterdir())


def test_without_a_supervisor_nothing_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(verdict.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    verdict.promise(5.0)
    verdict.promise_no_more()
    assert not list(tmp_path.iterdir())
