"""A warm pool of worker processes that stand where torchrun's would: tests run functions on some of them.

To start Python and import torch takes seconds, so each worker starts once, when a case first needs it, and
takes one case after another. What a case leaves behind (process group, environment, folder, signal handlers,
caches that know its mesh) is cleared; other globals are the case's to put back. If one worker dies or doesn't
answer, all are killed, and the next case starts others.
"""

import faulthandler
import io
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

SIZE = 8
START = 120.0  # seconds that a worker has for its imports, on a machine that is busy otherwise
GRACE = 5.0  # seconds that the other ranks have to end by themselves once one has failed
LOCALHOST = "127.0.0.1"
ROOT = str(Path(__file__).resolve().parent.parent)

DIED, UNANSWERED = "Died", "Unanswered"

# What a rank says that has lost a peer: the one to look at is the rank that it lost.
LOST_PEER = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|failed to recv"
)


@dataclass(frozen=True)
class Failure:
    """How a rank failed: by an exception (SystemExit is one), by dying, or by not answering in time.

    type: the name of the exception's class, or DIED, or UNANSWERED. message: its text.
    traceback: as Python prints it, or nothing.
    at: when, in seconds of the machine's monotonic clock, which all processes share.
    echo: whether it only tells that another rank was lost.
    """

    type: str
    message: str
    traceback: str = ""
    at: float = 0.0
    echo: bool = False

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


@dataclass(frozen=True)
class Outcome:
    """What a case came to on one rank: the function's value or its failure, and what was printed meanwhile."""

    rank: int
    value: Any
    failure: Failure | None
    stdout: str
    stderr: str


class RankFailed(AssertionError):
    """A function failed on a rank. The text shows the failure that came first, and what all ranks printed."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        super().__init__(describe(outcomes))
        self.outcomes = outcomes


def describe(outcomes: list[Outcome]) -> str:
    """The failures, the one that came first in full, then all that was printed."""
    failed = [(outcome.rank, outcome.failure) for outcome in outcomes if outcome.failure]
    failed.sort(key=lambda one: (one[1].echo, one[1].at))
    rank, first = failed[0]
    lines = [f"rank {rank} of {len(outcomes)} failed first: {first}", first.traceback.rstrip()]
    lines += [f"rank {rank} failed too: {failure}" for rank, failure in failed[1:]]
    for outcome in outcomes:
        for name, text in ("stdout", outcome.stdout), ("stderr", outcome.stderr):
            lines += [f"---- rank {outcome.rank}, {name} ----", text.rstrip()] if text else []
    return "\n".join(line for line in lines if line)


class RankPool:
    """`pool(function, ranks)` runs a function on ranks; `pool.outcomes(function, ranks)` one that may fail.

    The function stands in a module that the workers can import, as a test module is. It finds RANK, WORLD_SIZE
    and the other variables of torchrun, with a store to meet at, and opens the process group itself.
    """

    def __init__(self) -> None:
        self.workers: list[Worker] = []

    def __call__(
        self, function: Callable[..., Any], ranks: int, /, *args: Any, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """What `function(*args, **kwargs)` returns on each of `ranks` ranks, by rank.

        Raises RankFailed if it fails on one or takes more than `timeout` seconds, and ends the workers.
        """
        __tracebackhide__ = True
        outcomes = self._run(pickle.dumps((function, args, kwargs)), ranks, timeout, GRACE)
        if any(outcome.failure for outcome in outcomes):
            self.close()
            raise RankFailed(outcomes)
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, function: Callable[..., Any], ranks: int, /, *args: Any, timeout: float = 120.0, **kwargs: Any
    ) -> list[Outcome]:
        """What it came to on each rank, by rank. All have the whole `timeout`, even if one has failed."""
        return self._run(pickle.dumps((function, args, kwargs)), ranks, timeout, timeout)

    def close(self) -> None:
        """End all workers, whatever they are doing. The next case starts others."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def _run(self, call: bytes, ranks: int, timeout: float, grace: float) -> list[Outcome]:
        assert 1 <= ranks <= SIZE, f"{ranks} ranks of {SIZE}"
        try:
            workers = self._ready(ranks)
            store = open_store()
            for worker in workers:
                worker.send(torchrun_variables(worker.rank, ranks, store.port), call)
            answers = collect(workers, timeout, grace)
            outcomes = [
                Outcome(worker.rank, *answers[worker.rank], printed(worker.stdout), printed(worker.stderr))
                for worker in workers
            ]
        except BaseException:  # an interrupt too: a late answer must not pass for the next case's
            self.close()
            raise
        if any(outcome.failure and outcome.failure.type in (DIED, UNANSWERED) for outcome in outcomes):
            self.close()
        return outcomes

    def _ready(self, ranks: int) -> list["Worker"]:
        """The first `ranks` workers. Missing ones are started; all are if one has died since its last case."""
        if not all(worker.process.is_alive() for worker in self.workers):
            self.close()
        while len(self.workers) < ranks:
            self.workers.append(Worker(len(self.workers)))
        for worker in self.workers[:ranks]:
            worker.wait_until_ready()
        return self.workers[:ranks]


class Worker:
    """A worker as the test's process sees it."""

    def __init__(self, rank: int) -> None:
        if ROOT not in sys.path:  # the worker gets this path, and finds the tests' modules by it
            sys.path.insert(0, ROOT)
        context = multiprocessing.get_context("spawn")
        self.rank = rank
        self.ready = False
        self.folder = tempfile.TemporaryDirectory(prefix=f"rank{rank}-")
        self.stdout, self.stderr = (Path(self.folder.name, name) for name in ("stdout", "stderr"))
        for path in self.stdout, self.stderr:
            path.touch()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.stdout, self.stderr), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the worker

    def wait_until_ready(self) -> None:
        """Wait for the worker's imports. Raises RuntimeError with what it printed if they fail."""
        if not self.ready:
            with suppress(EOFError, OSError):
                self.ready = self.pipe.poll(START) and self.pipe.recv_bytes() == READY
        if not self.ready:
            raise RuntimeError(f"the worker for rank {self.rank} did not start:\n{printed(self.stderr)}")

    def send(self, variables: dict[str, str], call: bytes) -> None:
        """Have it run a case, with this process's environment, `variables` and folder."""
        for path in self.stdout, self.stderr:
            os.truncate(path, 0)
        self.pipe.send_bytes(pickle.dumps((os.environ | variables, os.getcwd(), call)))

    def exit_text(self) -> str:
        """How it died."""
        self.process.join(GRACE)
        code = self.process.exitcode
        return f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"

    def print_where_it_stands(self) -> None:
        """Have it write its threads' stacks to its stderr, and wait until it has, if it does."""
        assert self.process.pid
        size = at_first = self.stderr.stat().st_size
        os.kill(self.process.pid, signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.05)
            before, size = size, self.stderr.stat().st_size
            if at_first < before == size:
                return

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.folder.cleanup()


def printed(path: Path) -> str:
    """What a worker printed there. It may have died in the middle of a character."""
    return path.read_text(encoding="utf-8", errors="replace")


def open_store() -> "TCPStore":
    """A store for a case, hosted here as torchrun's agent does it: no port is found free first and taken later.

    Its socket speaks IPv4 alone. To torch's own, peers are at ::ffff:127.0.0.1, and torch asks the name server,
    which may be slow or out of reach, for the name of each.
    """
    # Not above: tests that need no ranks need no torch.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listener = socket.create_server((LOCALHOST, 0))
    port = listener.getsockname()[1]
    return TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def torchrun_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on a single node whose agent hosts the store."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }


def collect(workers: list[Worker], timeout: float, grace: float) -> dict[int, tuple[Any, Failure | None]]:
    """Value and failure by rank. Waits `timeout` seconds, but at most `grace` more once a rank has failed."""
    answers: dict[int, tuple[Any, Failure | None]] = {}
    waiting: dict[Any, Worker] = {worker.pipe: worker for worker in workers}
    start = time.monotonic()
    end = start + timeout
    while waiting and (left := end - time.monotonic()) > 0:
        for pipe in wait(list(waiting), left):
            worker = waiting.pop(pipe)
            try:
                answers[worker.rank] = pickle.loads(worker.pipe.recv_bytes())
            except (EOFError, OSError):
                answers[worker.rank] = None, Failure(DIED, worker.exit_text(), at=time.monotonic())
            if answers[worker.rank][1]:
                end = min(end, time.monotonic() + grace)
    seconds = time.monotonic() - start
    for worker in waiting.values():
        worker.print_where_it_stands()
        answers[worker.rank] = None, Failure(UNANSWERED, f"no answer after {seconds:.1f} s", at=float("inf"))
    return answers


# Below is what runs in a worker.

READY = b"ready"


def work(pipe: Connection, stdout: Path, stderr: Path) -> None:
    """A worker's life: import, then take cases until the test's process closes the pipe or ends."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test's process, which kills the workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    for stream, path in (sys.stdout, stdout), (sys.stderr, stderr):
        with open(path, "ab") as file:  # to append is to go on at the start when the file was truncated
            os.dup2(file.fileno(), stream.fileno())
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", line_buffering=True)  # what is printed before os._exit isn't lost
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)

    import torch

    with suppress(Exception):  # a broken module is reported by the case that needs it
        import trainwright.trainers.train  # noqa: F401

    torch.set_num_threads(1)
    pipe.send_bytes(READY)
    while True:
        try:
            variables, folder, call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        with as_under_torchrun(variables, folder):
            answer = run(call)
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send_bytes(answer)


def end_with_parent() -> None:
    """End this process when the one that started it has ended, even if a case hangs."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


@contextmanager
def as_under_torchrun(variables: dict[str, str], folder: str) -> Iterator[None]:
    """The body has this environment, this folder and the usual signal handlers; all is put back after it."""
    import torch.distributed as dist

    variables_before, folder_before = dict(os.environ), os.getcwd()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    handlers = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
        forget_meshes()
        os.chdir(folder_before)
        os.environ.clear()
        os.environ.update(variables_before)


def forget_meshes() -> None:
    """Clear DTensor's caches: they keep a mesh and find it for the next that is equal, whose groups are others.

    `torch.distributed.tensor.debug` has a function for this, but it imports the compiler, which takes a second.
    """
    import torch
    from torch.distributed.tensor import DTensor

    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    if hasattr(torch._C, "_clear_DTensor_sharding_propagator_cache"):  # not in every torch that we support
        torch._C._clear_DTensor_sharding_propagator_cache()


def run(call: bytes) -> bytes:
    """The pickled value and failure of a pickled call."""
    try:
        function, args, kwargs = pickle.loads(call)
        return pickle.dumps((function(*args, **kwargs), None))
    except BaseException as error:  # SystemExit and KeyboardInterrupt are outcomes too
        at = time.monotonic()
        frames = error.__traceback__.tb_next if error.__traceback__ else None  # without this one
        text = "".join(traceback.format_exception(error.with_traceback(frames)))
        return pickle.dumps((None, Failure(type(error).__name__, str(error), text, at, is_echo(error))))


def is_echo(error: BaseException) -> bool:
    """Whether the exception, or the one that it came from, tells of a lost peer."""
    while before := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = before
    return bool(LOST_PEER.search(str(error)))
