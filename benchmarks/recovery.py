"""What a save, a failure and a restart cost on this machine: the parts of `trainwright plan goodput`.

    python benchmarks/recovery.py                       # some ten minutes on two cores
    python benchmarks/recovery.py --faults 1 --out /tmp/recovery.json

The default recipe (a Llama of 5 M parameters). Saves: one rank of one thread, so that the writer has a core of
its own, as beside a device; what the steps beside a save took longer is `slow_s`. Failures: two ranks under
`trainwright launch torchrun`; `--faults` times a rank is killed, and as often one is stopped, so
that it hangs, and the run's own ledger says how long it was down. `hang_s` is what a hang's end took beyond the
watchdog's bound. Reading a checkpoint is timed by itself, in this process, and so is the meeting of 2 to 16
ranks. All are medians, but for the meeting: of five the shortest, as ranks here share cores.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from trainwright.configs.compose import load_recipe
from trainwright.launch.processes import below
from trainwright.trainers.goodput import is_mark
from trainwright.trainers.observers.json_lines import read_lines
from trainwright.trainers.plan.goodput_parts import slowed

RESULTS = Path(__file__).parent / "results" / "recovery.json"
LIMIT = 300.0  # seconds until a run that hasn't gone on counts as lost
FLOOR, FACTOR = 10.0, 5  # resilience.hang_floor_s and hang_factor
RANKS = (2, 4, 8, 16)  # that meet
SAVES_BETWEEN = 2  # saves that are waited for before the next fault
NAME = "recovery"

SAVES = 10  # of the run of one rank
EVERY = 20  # steps

RECIPE = (
    *("train.seq_len=64", f"checkpoint.every={EVERY}", "data.validation.fraction=0"),
    *("platform=cpu", "health.check=false", "monitor.tensorboard=false", f"run.name={NAME}"),
    *(f"resilience.hang_floor_s={FLOOR}", f"resilience.hang_factor={FACTOR}"),
)
SUPERVISED = ("launch", "torchrun", "launch.procs_per_node=2", "launch.restarts=1000", "train.steps=1000000")


class Run:
    """A run of the recipe in `folder`, started by `words`."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder / NAME
        folder.mkdir()
        command = [sys.executable, "-m", "trainwright", *words, *RECIPE, f"run.dir={folder}"]
        self.log = (folder / "log.txt").open("wb")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)

    def worker(self) -> int:
        """The pid of the second rank: its death isn't the ledger's writer's."""
        there = below(self.process.pid)
        torchruns = [pid for pid, parent in there.items() if parent == self.process.pid]
        return sorted(pid for pid, parent in there.items() if parent in torchruns)[-1]

    def marks(self) -> list[dict[str, Any]]:
        return [mark for _, mark in read_lines(self.folder / "ledger.jsonl") if is_mark(mark)]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for _, event in read_lines(self.folder / "events.jsonl") if event.get("event") == name]

    def wait(self, true: Callable[[], bool]) -> None:
        """Until it comes true.

        Raises:
            RuntimeError: it doesn't, or the run has ended.
        """
        end = time.monotonic() + LIMIT
        while not true():
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(
                    f"the run doesn't go on: {(self.folder.parent / 'log.txt').read_text()[-2000:]}"
                )
            time.sleep(0.1)

    def strike(self, by: signal.Signals) -> float:
        """Send the signal to a rank once the run works, wait until it works again; seconds that it was down."""
        saves = len(self.events("checkpoint"))
        self.wait(lambda: len(self.events("checkpoint")) >= saves + SAVES_BETWEEN)
        starts = sum(mark["at"] == "begin" for mark in self.marks())
        struck = time.time()
        os.kill(self.worker(), by)

        def again() -> bool:
            marks = self.marks()
            return sum(m["at"] == "begin" for m in marks) > starts and str(marks[-1]["at"]) == "step"

        self.wait(again)
        marks = self.marks()
        worked = max(float(mark["t"]) for mark in marks if mark["t"] <= struck)
        return max(float(mark["t"]) for mark in marks if mark["at"] == "begin") - worked

    def start_ups(self) -> list[float]:
        """From each process's beginning to the end of its first step, less a step."""
        step = self.step()
        found, began = [], None
        for mark in self.marks():
            if mark["at"] == "begin":
                began = mark["t"]
            elif mark["at"] == "step" and began is not None:
                found.append(mark["t"] - began - step)
                began = None
        return found

    def step(self) -> float:
        return statistics.median(float(mark["step_s"]) for mark in self.marks() if mark["at"] == "step")

    def close(self) -> None:
        """Ask the supervisor to end, and see to it that all below it does."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(120)
        for pid in (self.process.pid, *below(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.log.close()


def load_seconds(folder: Path, times: int) -> list[float]:
    """Find, check and read the newest checkpoint of the run in `folder`, into a model that is there."""
    from trainwright.trainers.build import build_stepper
    from trainwright.trainers.checkpoint.load import newest_whole, read_state
    from trainwright.trainers.checkpoint.place import place
    from trainwright.trainers.parallel.ranks import Ranks
    from trainwright.trainers.platform.cpu import Cpu
    from trainwright.trainers.tasks.pretrain import Pretraining

    recipe, ranks = load_recipe([*RECIPE, f"run.dir={folder}"]), Ranks()
    stepper, _ = build_stepper(recipe, Pretraining(recipe, ranks), ranks, Cpu(), None)
    found = []
    for _ in range(times):
        began = time.perf_counter()
        newest = newest_whole(place(str(folder / NAME / "checkpoints")), ranks, lambda *fault: None)
        assert newest is not None, "the run has saved"
        state = stepper.state_dict()
        read_state(newest, state, alone=True)
        stepper.load_state_dict(state)
        found.append(time.perf_counter() - began)
    return found


def _meet(rank: int, ranks: int, port: int, all_there: Barrier, took: Any) -> None:
    all_there.wait()
    began = time.perf_counter()
    endpoint = f"tcp://localhost:{port}"
    torch.distributed.init_process_group(
        "gloo", endpoint, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    torch.distributed.barrier()
    took[rank] = time.perf_counter() - began
    all_there.wait()
    os._exit(0)


def meeting_seconds(ranks: int) -> float:
    """How long `ranks` processes, all there, take to make a process group."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")  # the imports aren't timed
    all_there, took = fork.Barrier(ranks), fork.Array("d", ranks)
    processes = [fork.Process(target=_meet, args=(rank, ranks, port, all_there, took)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(float(seconds) for seconds in took)  # type: ignore[attr-defined]


def measure(faults: int) -> dict[str, Any]:
    """All parts, in seconds."""
    meetings = {n: min(meeting_seconds(n) for _ in range(5)) for n in RANKS}
    print(f"meeting: {meetings}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        alone = Run(Path(name) / "alone", "train", f"train.steps={EVERY * SAVES + EVERY // 2}")
        alone.process.wait(LIMIT)
        saves = alone.events("checkpoint")
        measured: dict[str, list[float]] = {
            "stall": [event["stall_s"] for event in alone.events("checkpoint_begun")],
            "slow": list(slowed(alone.marks())),
            "save": [event["write_s"] for event in saves],
            "load": load_seconds(alone.folder.parent, 5),
        }
        step = alone.step()
        alone.close()
        run = Run(Path(name) / "two", *SUPERVISED)
        try:
            crashes, hangs = [], []
            for _ in range(faults):
                crashes.append(run.strike(signal.SIGKILL))
                hangs.append(run.strike(signal.SIGSTOP))
                print(f"down after a kill {crashes[-1]:.2f} s, after a stop {hangs[-1]:.2f} s", flush=True)
            bound = max(FLOOR, FACTOR * run.step())
            measured |= {
                "start_and_load": run.start_ups(),
                "detect": crashes,
                "hang_beyond_bound": [hang - bound for hang in hangs],
            }
        finally:
            run.close()
    middle = {part: statistics.median(seconds) for part, seconds in measured.items()}
    few, many = min(RANKS), max(RANKS)
    return {
        "stall_s": round(middle["stall"], 5),
        "slow_s": round(max(0.0, middle["slow"]), 4),
        "save_s": round(middle["save"], 4),
        "load_s": round(middle["load"], 4),
        "start_s": round(middle["start_and_load"] - middle["load"], 3),
        "rendezvous_s_per_rank": round((meetings[many] - meetings[few]) / (many - few), 5),
        "detect_s": round(middle["detect"], 3),
        "hang_s": round(middle["hang_beyond_bound"], 3),
        "step_s": round(step, 4),
        "bytes_per_node": saves[-1]["bytes"],
        "measured": {part: [round(s, 4) for s in seconds] for part, seconds in measured.items()},
        "meeting_s": {str(n): round(seconds, 4) for n, seconds in meetings.items()},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--faults", type=int, default=5, help="of each kind")
    options = parser.parse_args()
    result = measure(options.faults)
    about = {
        "command": "python benchmarks/recovery.py",
        "ranks": 2,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[1], 1),  # of other work too, over five minutes
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**about, **result}, indent=2) + "\n")
    for name, value in result.items():
        if isinstance(value, float | int):
            print(f"{name:<22} {value:,}")
    print(options.out)


if __name__ == "__main__":
    main()
