import json
import os
import signal
import time
from pathlib import Path

import pytest

from trainwright import verdict
from trainwright.errors import BadRequest, RunFailed
from trainwright.launch import reasons
from trainwright.launch.endings import Notice, Verdicts, how_it_ended
from trainwright.launch.reasons import Place, tell_platforms

TERM, INT = signal.SIGTERM, signal.SIGINT
NO_PID = 1 << 22  # and all above: Linux gives none of them


def leave(
    folder: Path, *rounds: dict[int, int | None], pid: int = NO_PID, worked: float | None = 0.0
) -> Verdicts:
    """Verdicts as workers leave them: of each round, the status by local rank; None is a killed one."""
    for number, statuses in enumerate(rounds):
        for local_rank, status in statuses.items():
            said = {
                "rank": 8 + local_rank,
                "local_rank": local_rank,
                "started": float(number),
                "worked": worked,
                "status": status,
            }
            line = "" if status is None else f"round {number} ended with {status}"
            (folder / f"{local_rank}-{pid + number}.json").write_text(json.dumps({**said, "line": line}))
    return Verdicts(folder)


def test_how_long_there_has_been_no_worker(tmp_path: Path):
    verdicts = leave(tmp_path, {0: 1, 1: 1})
    for place, left in ((0, 400.0), (1, 300.0)):
        os.utime(tmp_path / f"{place}-{NO_PID}.json", (left, left))
    assert verdicts.idle() == pytest.approx(time.time() - 400, abs=5)
    leave(tmp_path, {1: None}, pid=os.getpid())
    assert verdicts.idle() == pytest.approx(0, abs=5)
    assert Verdicts(tmp_path / "none").idle() == pytest.approx(0, abs=5)


def test_a_worker_that_was_killed_has_ended(tmp_path: Path, monkeypatch):
    verdicts = leave(tmp_path, {0: None})
    assert verdicts.idle() == pytest.approx(0, abs=5)  # from when it was first seen
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1890)
    assert verdicts.idle() == pytest.approx(1890, abs=5)


@pytest.mark.parametrize(("worked", "status"), [(None, 2), (0.0, 1)])
def test_a_killed_worker_is_explained_by_whether_it_had_worked(
    tmp_path: Path, worked: float | None, status: int
):
    verdicts = leave(tmp_path, {0: None}, worked=worked)
    verdicts.explain = lambda _since, worked: RunFailed("again") if worked else BadRequest("too small")
    assert verdicts.last()[0].status == status


def test_work_is_from_a_workers_first_step_to_its_last(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(verdict.FOLDER, str(tmp_path / "1"))
    (tmp_path / "1").mkdir()
    for name, value in (("_first_step", None), ("_noted", 0.0)):
        monkeypatch.setattr(verdict, name, value)
    verdicts, clock = Verdicts(tmp_path / "1"), 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    verdict.begin()
    clock += 1800  # it loads, or hangs
    assert (verdicts.worked(), verdict.opened()) == (0, False)
    verdict.worked()
    assert (verdicts.worked(), verdict.opened()) == (0, True)
    clock += 59
    verdict.worked()
    assert verdicts.worked() == 0  # the disk is spared
    clock += 300
    verdict.worked()
    assert verdicts.worked() == 359
    clock += 1800  # it hangs
    verdict.leave(1, "a hang")
    assert verdicts.worked() == 359


@pytest.mark.parametrize(
    ("torchrun", "asked", "rounds", "status", "line"),
    [
        (0, None, [{0: 0, 1: 0}], 0, "done"),
        (0, None, [{0: 1}, {0: 0}], 0, "done"),
        (1, None, [{0: 2, 1: 2}], 2, "round 0 ended with 2"),
        (-15, None, [{0: 76, 1: None}], 76, "round 0 ended with 76"),
        (1, None, [{0: 1, 1: 77}], 77, "round 0 ended with 77"),  # one rank says that its node is bad
        (1, TERM, [{0: 77}, {0: 75}], 77, "round 0 ended with 77"),
        (1, None, [{0: 130}], 130, "round 0 ended with 130"),
        (1, INT, [{0: 130, 1: None}], 130, "interrupted"),
        # told to end
        (1, TERM, [{0: 75, 1: 75}], 75, "SIGTERM: saved"),
        (1, signal.SIGUSR1, [{0: 75}], 75, "SIGUSR1: saved"),
        (1, TERM, [{0: 0, 1: 0}], 0, "done"),
        (1, TERM, [{0: 0, 1: 75}], 75, "SIGTERM: saved"),
        (1, TERM, [{0: 75, 1: None}], 1, "rank 9 ended without a word"),
        (1, TERM, [{0: 75, 1: 1}], 1, "round 0 ended with 1"),
        (-15, TERM, [], 75, "SIGTERM while no rank ran"),
        # gave up by itself
        (1, None, [{0: 75}], 75, "round 0 ended with 75"),
        (1, None, [{0: 75}, {0: 1}], 1, "round 1 ended with 1"),  # an old round's word doesn't count
        (1, None, [{0: 75}, {0: None}], 1, "rank 8 ended without a word"),
        (1, None, [{0: 1, 1: None}], 1, "round 0 ended with 1"),
        (1, None, [{0: 0, 1: 0}], 1, "torchrun ended with status 1 after its ranks had ended"),
        (1, None, [], 1, "torchrun ended with status 1 before a rank had started"),
        (-9, None, [{0: 75}, {0: None}], 1, "torchrun was killed by SIGKILL"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, torchrun, asked, rounds, status: int, line: str):
    notice = asked and Notice(asked, time.time() - 5)
    ending = how_it_ended(torchrun, leave(tmp_path, *rounds), notice)
    assert ending.status == status
    assert ending.line.startswith(line)


@pytest.mark.parametrize("status", [1, 75, None])
def test_workers_that_had_ended_before_the_notice_do_not_count(tmp_path: Path, status: int | None):
    verdicts = leave(tmp_path, {0: status})
    verdicts.last()  # the supervisor looks all the time
    assert how_it_ended(1, verdicts, Notice(TERM, time.time() + 5)).status == 75


def test_a_worker_leaves_word_when_it_starts_and_when_it_ends(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(verdict.FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    verdict.begin()
    (running,) = Verdicts(tmp_path).last()
    assert (running.rank, running.local_rank, running.status) == (9, 1, None)
    verdict.leave(76, "rank 9: loss is nan")
    (ended,) = Verdicts(tmp_path).last()
    assert (ended.status, ended.line) == (76, "rank 9: loss is nan")
    monkeypatch.setenv(verdict.FOLDER, str(tmp_path / "gone"))
    verdict.leave(0)  # the supervisor has ended


def test_reasons_go_where_a_platform_is(tmp_path: Path, monkeypatch):
    sagemaker, kubernetes = tmp_path / "output" / "failure", tmp_path / "termination-log"
    places = (
        Place(str(sagemaker), "SM_OUTPUT_FAILURE", None, False, 1024),
        Place(str(kubernetes), "TERMINATION_MESSAGE_PATH", "KUBERNETES_SERVICE_HOST", True, 4096),
    )
    monkeypatch.setattr(reasons, "PLACES", places)
    tell_platforms("why", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})  # neither is there
    assert list(tmp_path.iterdir()) == []
    sagemaker.parent.mkdir()
    kubernetes.touch()
    tell_platforms("ü" * 3000, {})
    assert sagemaker.read_text() == "ü" * 512
    assert kubernetes.read_text() == ""  # a file of that name is no pod
    tell_platforms("why", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert (sagemaker.read_text(), kubernetes.read_text()) == ("why", "why")
    moved = tmp_path / "moved"
    tell_platforms("where", {"SM_OUTPUT_FAILURE": str(moved)})
    assert (moved.read_text(), sagemaker.read_text()) == ("where", "why")


def test_the_places_are_those_that_platforms_read():
    assert [place.path for place in reasons.PLACES] == ["/opt/ml/output/failure", "/dev/termination-log"]
