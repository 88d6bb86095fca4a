"""Nodes on one machine: supervisors that meet at a port of it, each with one rank, and what became of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from trainwright.launch.processes import below

PATIENCE = 120.0  # seconds until what a test waits for counts as never coming


def until(true: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Node:
    """A supervisor and all below it."""

    def __init__(self, name: str, run: "Run", environment: dict[str, str]):
        self.name, self.run = name, run
        self.said = run.folder / f"{name}.{len(run.nodes)}.log"
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                run.words,
                cwd=run.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MARK": run.mark, "NODE": name, **environment},
                stdout=said,
                stderr=said,
            )

    def workers(self) -> list[int]:
        """The pids of this node's workers that have come to their first step, those of earlier starts too."""
        there = below(self.process.pid)
        return [pid for pid in map(int, self.logs()) if pid in there]

    def children(self) -> list[int]:
        """The pids of the workers that torchrun has just now, whatever they do."""
        there = below(self.process.pid)
        return [pid for pid, parent in there.items() if there.get(parent) == self.process.pid]

    def logs(self) -> dict[str, list[list[str]]]:
        """The lines of each of the node's workers, by its pid, in order of their start."""
        paths = sorted(self.run.output.glob(f"{self.name}-*"), key=lambda path: path.stat().st_ctime_ns)
        return {path.name.split("-")[1]: [line.split() for line in path.open()] for path in paths}

    def at(self, step: int, ranks: int | None = None) -> bool:
        """Whether a worker that is there has come to `step`, among so many ranks."""
        lines = [line for pid in map(str, self.workers()) for line in self.logs()[pid]]
        return any(int(at) >= step and ranks in (None, int(size)) for at, size in lines)

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.workers()[-1], number)

    def kill_all(self) -> None:
        """What the loss of a machine is: nothing of it says a word any more."""
        for pid in (self.process.pid, *below(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def ends(self, seconds: float = PATIENCE) -> int:
        return self.process.wait(seconds)

    def last_line(self) -> str:
        return self.said.read_text().strip().splitlines()[-1]


class Run:
    """A run of `working.py`, or of another program, on nodes that come and go."""

    def __init__(self, folder: Path, *words: str, program: str = "supervised.py"):
        self.folder, self.output, self.mark = folder, folder / "runs" / "two", str(uuid.uuid4())
        self.output.mkdir(parents=True, exist_ok=True)
        self.nodes: list[Node] = []
        self.port = free_port()
        self.words = [sys.executable, str(Path(__file__).with_name(program)), "launch", "torchrun"]
        self.words += ["launch.procs_per_node=1", f"launch.rendezvous=localhost:{self.port}"]
        self.words += ["run.name=two", *words]

    def node(self, name: str, **environment: str) -> Node:
        """Start a node, as an orchestrator does; the first one hosts the rendezvous."""
        self.nodes.append(Node(name, self, environment))
        if len(self.nodes) == 1:
            until(self._hosted, "the rendezvous")
        return self.nodes[-1]

    def _hosted(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("localhost", self.port)) == 0

    def left_behind(self) -> list[int]:
        """Processes of the run that are there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"MARK={self.mark}".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def close(self) -> None:
        for pid in self.left_behind():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self.nodes:
            node.process.wait()
