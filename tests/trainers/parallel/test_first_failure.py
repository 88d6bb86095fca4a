import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from trainwright.errors import BadRequest, NumericalFailure, RunFailed
from trainwright.trainers.parallel import first_failure, ranks
from trainwright.trainers.parallel.first_failure import lost_peers, say_once

CLOSED = (
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:5343. This is typically caused by a remote worker crashing. GLHF!"
)
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
    "network error, NCCL version 2.21.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node7<43210>"
)


class Run:
    """The ranks of a run, one after another in this process: they share what the launcher shares, its store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path):
        self.monkeypatch, self.capfd, self.folder = monkeypatch, capfd, folder
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.set(
            WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.store.port)
        )
        self.set(TORCHELASTIC_RUN_ID="one", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_USE_AGENT_STORE="True")

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self.monkeypatch.setenv(name, value)

    def fails(self, rank: int, error: BaseException, debug: bool = False) -> tuple[int, str]:
        """Exit status and stderr of a rank."""
        self.set(RANK=str(rank), TORCHELASTIC_ERROR_FILE=str(self.folder / f"{rank}.json"))
        status, printed = say_once(error, debug), self.capfd.readouterr().err
        # torch's own warning where the machine's name service is slow; it may come from any client of a store
        return status, re.sub(r"\[W.* The hostname of the client socket .*\n", "", printed)

    def summary(self, rank: int) -> str:
        """What torchrun's summary says of a rank."""
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

        failure = ProcessFailure(rank, 1, 1, str(self.folder / f"{rank}.json"))
        assert abs(failure.timestamp - time.time()) < 60
        return re.search("traceback : (.*)", ChildFailedError("x", {rank: failure}).format_msg()).group(1)


@pytest.fixture
def run(monkeypatch, capfd, tmp_path) -> Iterator[Run]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(first_failure, "PATIENCE", 0.3)
    yield Run(monkeypatch, capfd, tmp_path)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_rank_speaks_and_the_others_take_its_status(run: Run):
    assert run.fails(3, NumericalFailure("loss is nan")) == (76, "trainwright: rank 3: loss is nan\n")
    assert run.fails(0, BadRequest("another thing")) == (76, "")
    assert run.fails(1, ValueError("a bug")) == (76, "")
    assert run.fails(2, RuntimeError(CLOSED)) == (76, "")


def test_torchruns_summary_has_the_line_on_every_rank(run: Run):
    run.fails(3, NumericalFailure("loss is nan"))
    run.fails(0, RuntimeError(CLOSED))
    assert [run.summary(3), run.summary(0)] == ["rank 3: loss is nan"] * 2
    error = json.loads((run.folder / "3.json").read_text())["message"]
    assert error["message"] == "rank 3: loss is nan"  # in a dictionary: torchrun warns of a plain string


def test_an_unexpected_error_shows_its_traceback_once(run: Run):
    with pytest.raises(OSError) as caught:  # noqa: PT011
        os.stat("/no/such/file")
    status, said = run.fails(1, caught.value)
    assert status == 1
    assert said.startswith("trainwright: rank 1:\nTraceback")
    assert said.endswith("No such file or directory: '/no/such/file'\n")
    assert run.fails(0, caught.value) == (1, "")
    assert run.summary(0).startswith("rank 1: FileNotFoundError: [Errno 2]")


def test_debug_shows_a_sentences_traceback_and_keeps_its_status(run: Run):
    status, said = run.fails(1, BadRequest("no"), debug=True)
    assert status == 2
    assert said == "trainwright: rank 1:\ntrainwright.errors.BadRequest: no\n"
    assert run.fails(0, BadRequest("no"), debug=True) == (2, "")


def test_a_restarted_run_and_another_run_on_the_same_store_speak_again(run: Run):
    assert run.fails(1, BadRequest("no")) == (2, "trainwright: rank 1: no\n")
    run.set(TORCHELASTIC_RESTART_COUNT="1")
    assert run.fails(0, BadRequest("no")) == (2, "trainwright: rank 0: no\n")
    run.set(TORCHELASTIC_RUN_ID="two")
    assert run.fails(2, BadRequest("no")) == (2, "trainwright: rank 2: no\n")


def test_another_round_at_the_same_port_speaks_again(run: Run, monkeypatch):
    for drawn in ("one", "two"):
        monkeypatch.setattr(ranks, "_round", drawn)
        assert run.fails(1, BadRequest("no")) == (2, "trainwright: rank 1: no\n")


@pytest.mark.parametrize("connected", [False, True])
def test_a_store_that_hangs_keeps_nobody_from_speaking(run: Run, monkeypatch, connected: bool):
    host = "import torch.distributed as d, signal; s = d.TCPStore('127.0.0.1', 0, is_master=True, "
    host += "wait_for_workers=False); print(s.port, flush=True); signal.pause()"
    monkeypatch.setattr(first_failure, "REACH", 0.5)
    with subprocess.Popen([sys.executable, "-c", host], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            run.set(MASTER_PORT=process.stdout.readline().strip())
            if connected:
                store = first_failure.launchers_store()
                assert store is not None
                monkeypatch.setattr(first_failure, "launchers_store", lambda: store)
            process.send_signal(signal.SIGSTOP)
            start = time.monotonic()
            assert run.fails(1, BadRequest("no")) == (2, "trainwright: rank 1: no\n")
            assert time.monotonic() - start < 5
        finally:
            process.kill()
            for (
                thread
            ) in threading.enumerate():  # those that were given up, which say now that the store is gone
                if thread.name == "within":
                    thread.join(10)
            run.capfd.readouterr()


def test_ranks_on_several_hosts_name_theirs(run: Run):
    run.set(LOCAL_WORLD_SIZE="2")
    assert re.fullmatch(r"trainwright: rank 2 on \S+: no\n", run.fails(2, BadRequest("no"))[1])


@pytest.mark.parametrize("port", ["1", "none", ""])
def test_without_a_store_every_rank_speaks_and_torch_prints_nothing(run: Run, port: str):
    run.set(MASTER_PORT=port)
    assert run.fails(1, BadRequest("no")) == (2, "trainwright: rank 1: no\n")
    assert run.fails(0, BadRequest("no")) == (2, "trainwright: rank 0: no\n")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CLOSED, "Connection closed by peer [127.0.0.1]:5343"),
        (NCCL, "socketProgress: Connection closed by remote peer node7<43210>"),
    ],
)
def test_a_rank_that_lost_its_peers_waits_and_then_says_so(run: Run, text: str, reason: str):
    start = time.monotonic()
    status, said = run.fails(2, RuntimeError(text))
    assert time.monotonic() - start > first_failure.PATIENCE
    assert status == 1
    assert said == (
        "trainwright: rank 2: lost the other ranks, which usually means that one of them was killed, "
        f"for example because its machine ran out of memory: {reason}\n"
    )


def test_a_speaker_that_dies_before_it_spoke_is_replaced(run: Run):
    run.store.set(first_failure._key("claimed"), "1")
    assert run.fails(0, BadRequest("no")) == (2, "trainwright: rank 0: no\n")


def test_a_launchers_signal_does_not_take_the_status_away(run: Run):
    run.fails(0, BadRequest("no"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rank_0_alone_says_interrupted(run: Run, order: tuple[int, int]):
    said = {rank: run.fails(rank, KeyboardInterrupt()) for rank in order}
    assert said == {0: (130, "trainwright: interrupted\n"), 1: (130, "")}


def test_rank_0_says_interrupted_when_it_lost_an_interrupted_rank(run: Run):
    assert run.fails(1, KeyboardInterrupt()) == (130, "")
    assert run.fails(0, RuntimeError(CLOSED)) == (130, "trainwright: interrupted\n")


def test_an_interrupt_after_a_failure_says_nothing_more(run: Run):
    run.fails(1, BadRequest("no"))
    assert run.fails(0, KeyboardInterrupt()) == (2, "")


def raised(error: BaseException, while_handling: BaseException) -> BaseException:
    error.__context__ = while_handling
    return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(CLOSED), True),
        (RuntimeError(NCCL), True),
        (RuntimeError("[x.cc:78] Timed out waiting 5000ms for recv operation to complete"), True),
        (RuntimeError("[x.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("nrt_execute: NRT_EXEC_HW_ERR_COLLECTIVES"), True),
        (RuntimeError("nrt_execute: NRT_EXEC_HW_ERR_HBM_UE"), False),
        (RuntimeError("ncclUnhandledCudaError: Call to CUDA function failed."), False),
        (RuntimeError("Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"), False),
        (RuntimeError("The server socket has failed to listen on any local network address"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a file server's, not a collective's
        (raised(RuntimeError(CLOSED), while_handling=ValueError("the cause")), False),
        (raised(RunFailed("not saved"), while_handling=RuntimeError(CLOSED)), True),
    ],
)
def test_what_counts_as_lost_peers(error: BaseException, lost: bool):
    assert lost_peers(error) is lost
