"""Faults by chance into a run of two nodes: does it go on, how soon, and with which exit statuses.

    python benchmarks/launch_faults.py --faults 30                      # kill and term
    python benchmarks/launch_faults.py --faults 30 --kinds kill,term,hang,node
    python benchmarks/launch_faults.py --faults 10 --shared-store       # as torchrun restarts by itself

Two supervisors (`trainwright launch torchrun`) on this machine, one rank each, train a tiny Llama on the
standard library's sources. Each fault strikes one of them, drawn by chance: `kill` kills its worker, `term`
asks the supervisor to end and starts it again at once, `node` kills it and all below it and starts it again,
`hang` stops its worker's process. A supervisor that ends when it shouldn't is counted, and started again as an
orchestrator would. Recovered is a run that has taken a step after it resumed; its time is from the fault to
that step.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainwright.launch.processes import below

RESULTS = Path(__file__).parent / "results" / "launch_faults.json"
LIMIT = 240.0  # seconds until a run that hasn't gone on counts as hanging
SHARED = "from trainwright.launch import torchrun; torchrun.OURS.clear(); "
START = "import sys; from trainwright.cli import main; sys.exit(main())"
NODES = ("a", "b")
# The statuses that a supervisor may end with for each fault to its own node.
ENDS = {"kill": (), "term": (75,), "node": (-9,), "hang": ()}

RECIPE = (
    *("launch.nodes=2", "launch.procs_per_node=1", "launch.restarts=1000", "launch.relaunches=10"),
    *(
        "data=stdlib",
        "model.vocab_size=300",
        "data.tokenizer.vocab_size=300",
        "data.tokenizer.train_bytes=200000",
    ),
    *("model.hidden_size=32", "model.intermediate_size=64", "model.num_hidden_layers=2"),
    *("train.steps=1000000", "train.seq_len=128", "train.global_batch_size=4", "train.micro_batch_size=2"),
    *("monitor.tensorboard=false", "checkpoint.every=20", "resilience.hang_floor_s=10"),
    *("platform=cpu", "run.name=faults"),
)


class Run:
    """The two supervisors, and what the run's folder says."""

    def __init__(self, folder: Path, shared_store: bool) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            rendezvous = f"launch.rendezvous=localhost:{probe.getsockname()[1]}"
        start = SHARED + START if shared_store else START
        words = ("launch", "torchrun", *RECIPE, rendezvous, f"run.dir={folder}")
        self.command = [sys.executable, "-c", start, *words]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in NODES:
            self.start(name)

    def start(self, name: str) -> None:
        """Start a node's supervisor."""
        with (self.folder / f"{name}.log").open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.processes[name] = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def worker(self, name: str) -> int | None:
        """The pid of a node's worker: the lowest process below its supervisor."""
        top = self.processes[name].pid
        there = below(top)
        torchruns = [pid for pid, parent in there.items() if parent == top]
        workers = [pid for pid, parent in there.items() if parent in torchruns]
        return workers[0] if len(workers) == 1 else None

    def resumes(self) -> int:
        """How often the run has started or resumed."""
        return sum(line["event"] in ("start", "resume") for line in self._lines("events.jsonl"))

    def stepped(self) -> float:
        """When the last step was written."""
        path = self.folder / "faults" / "metrics.jsonl"
        return path.stat().st_mtime if path.exists() and path.stat().st_size else 0.0

    def _lines(self, name: str) -> list[dict[str, Any]]:
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / "faults" / name).read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last one is being written
                    lines.append(json.loads(line))
        return lines

    def trains(self, resumes: int) -> bool:
        """Whether the run has resumed more than `resumes` times and goes on: a step lies less than 1 s back."""
        return self.resumes() > resumes and time.time() - self.stepped() < 1

    def close(self) -> dict[str, int]:
        """Ask both to end; their statuses, and -9 for one that didn't."""
        for process in self.processes.values():
            process.terminate()
        statuses = {}
        for name, process in self.processes.items():
            try:
                statuses[name] = process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                statuses[name] = kill(process)
        return statuses


def kill(process: subprocess.Popen[bytes]) -> int:
    """Kill a supervisor and all below it at once."""
    for pid in (process.pid, *below(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.wait()


def wait(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def strike(run: Run, kind: str, name: str) -> None:
    """Do the fault to node `name`."""
    process = run.processes[name]
    if kind == "term":
        process.terminate()
    elif kind == "node":
        kill(process)
    else:
        wait(lambda: run.worker(name) is not None, LIMIT)  # it may be between two rounds
        if (worker := run.worker(name)) is None:
            raise AssertionError(f"node {name} has no worker to strike")
        os.kill(worker, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)


def fault(run: Run, kind: str, name: str) -> dict[str, Any]:
    """One fault and what came of it."""
    before, began = run.resumes(), time.monotonic()
    strike(run, kind, name)
    ends: list[tuple[str, int]] = []

    def on_again() -> bool:
        for node, process in run.processes.items():
            if process.poll() is not None:
                ends.append((node, process.returncode))
                run.start(node)
        return run.trains(before)

    recovered = wait(on_again, LIMIT)
    wrong = [end for end in ends if end[1] not in (ENDS[kind] if end[0] == name else ())]
    if ENDS[kind] and not any(node == name for node, _ in ends):
        wrong.append((name, 0))  # it should have ended
    seconds = round(time.monotonic() - began, 1)
    return {
        "kind": kind,
        "node": name,
        "recovered": recovered,
        "seconds": seconds,
        "ends": ends,
        "wrong": wrong,
    }


def summary(faults: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts and recovery times of faults."""
    times = [one["seconds"] for one in faults if one["recovered"]]
    return {
        "faults": len(faults),
        "recovered": len(times),
        "hangs": len(faults) - len(times),
        "wrong_statuses": sum(bool(one["wrong"]) for one in faults),
        "median_s": round(statistics.median(times), 1) if times else None,
        "max_s": max(times, default=None),
    }


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--kinds", default="kill,term", help=f"of {','.join(ENDS)}; kill,term unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared-store", action="store_true", help="leave torchrun's store to the workers")
    parser.add_argument("--keep", metavar="FOLDER", help="where the run and what the nodes say is to stay")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    draw, kinds = random.Random(args.seed), args.kinds.split(",")
    faults: list[dict[str, Any]] = []
    with contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), args.shared_store)
        try:
            if not wait(lambda: run.trains(0), LIMIT):
                sys.exit("the run doesn't start:\n" + (Path(folder) / "a.log").read_text())
            for number in range(args.faults):
                time.sleep(draw.uniform(1.0, 8.0))
                faults.append(fault(run, kinds[number % len(kinds)], draw.choice(NODES)))
                print(number + 1, faults[-1], flush=True)
                if not faults[-1]["recovered"]:  # begin anew, to count the next one fairly
                    print(*(path.read_text()[-3000:] for path in Path(folder).glob("*.log")), sep="\n")
                    for process in run.processes.values():
                        kill(process)
                    for name in NODES:
                        run.start(name)
                    wait(lambda: time.time() - run.stepped() < 1, LIMIT)
            last = run.close()
        finally:
            for process in run.processes.values():
                kill(process)
    results: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "store": "torchrun's, shared" if args.shared_store else "the ranks' own",
        "all": summary(faults),
        **{kind: summary([one for one in faults if one["kind"] == kind]) for kind in kinds},
        "last_statuses": last,
        "each": faults,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({**results, "each": None}, indent=1))
    if results["all"]["hangs"] or results["all"]["wrong_statuses"] or set(last.values()) != {75}:
        sys.exit(1)


if __name__ == "__main__":
    main()
