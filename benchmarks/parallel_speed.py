"""Training speed of two ranks, sharded (FSDP) and tensor-parallel (TP), against torchtitan's Llama.

    python benchmarks/parallel_speed.py                          # ours alone
    python benchmarks/parallel_speed.py --peer-python VENV/bin/python --peer-script titan_cpu.py

The 34 M Llama, 4 sequences of 512 a step, two ranks of one thread each; reduced precision is bf16 over fp32
weights on both sides. The two take turns step by step. Each is two processes of its own, stopped (SIGSTOP)
outside its turns, so that both see the machine in the same state and neither works during the other's steps. A
step's time is the same on both: from the word to begin until the slower rank has come to the end of the next
step. It holds all that the framework's own training does between two steps. Ours is the whole `train` path
(tokenizing and packing text, metrics files, TensorBoard, console); the peer draws random tokens and writes its
log. Quoted: medians, and the median of the ratios of neighbouring steps.

The peer's script is run under the peer's Python by this file. It must have `build_config(args)`, which gives a
configuration of torchtitan's Trainer, and `main()`, which builds and trains it; and take the options of
`peer_words`.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RANKS = 2
THREADS = 1  # of each rank
WARM = 3  # steps that are not counted: allocators and caches fill
MARK = "parameters="  # begins the line that ends a turn
BATCH, LENGTH = 4, 512
ROWS = [("fsdp", "fp32"), ("fsdp", "mixed"), ("tp", "fp32"), ("tp", "mixed")]


def our_words(layout: str, precision: str, folder: str) -> list[str]:
    """The benchmark's recipe; zero=3 gathers parameters anew for the backward pass, as the peer does."""
    return [
        "recipe=llama_34m",
        f"precision={precision}",
        f"train.global_batch_size={BATCH}",
        f"train.micro_batch_size={BATCH if layout == 'tp' else BATCH // RANKS}",
        f"train.seq_len={LENGTH}",
        "data.document_mask=false",
        "data.validation.fraction=0",
        f"run.dir={folder}",
        "platform=cpu",
        "parallel.zero=3",
        f"parallel.tp={RANKS if layout == 'tp' else 1}",
    ]


def peer_words(layout: str, precision: str, folder: str) -> list[str]:
    """The same model and batch in the peer script's words. TP brings sequence parallelism on both sides."""
    options = {
        "dim": 512,
        "layers": 8,
        "heads": 8,
        "ffn": 1376,
        "vocab": 8192,
        "seq": LENGTH,
        "batch": BATCH if layout == "tp" else BATCH // RANKS,  # of each data-parallel rank
        "dtype": "bfloat16" if precision == "mixed" else "float32",
        "optimizer": "fused",
        "tp": RANKS if layout == "tp" else 1,
        "steps": 1_000_000,  # ended from outside
        "data": "random",
        "threads": THREADS,
        "out": folder,
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def take_turn(parameters: int) -> None:
    """Tell the parent that this rank's step is done and wait until it is this side's turn again."""
    print(f"{MARK}{parameters}", flush=True)
    sys.stdin.readline()


def run_ours(words: list[str]) -> None:
    """`trainwright train` as anyone runs it; a step is everything between two turns."""
    from trainwright.configs.compose import load_recipe
    from trainwright.trainers.observers.base import Metrics, Observer, Progress, Run
    from trainwright.trainers.train import train

    class Turns(Observer):
        parameters = 0

        def on_start(self, run: Run, progress: Progress) -> None:
            self.parameters = run.parameters

        def on_step(self, progress: Progress, metrics: Metrics) -> None:
            take_turn(self.parameters)

    train(load_recipe(words), [Turns()])


def run_peer(words: list[str]) -> None:
    """The peer's script with its words; a step is everything between the ends of two of its Trainer's."""
    sys.argv = words
    spec = importlib.util.spec_from_file_location("peer_script", words[0])
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    sys.modules["peer_script"] = script  # its dataclasses look their module up
    spec.loader.exec_module(script)
    build_config = script.build_config

    def with_turns(args: Any) -> Any:
        trainer: Any = importlib.import_module("torchtitan.trainer").Trainer
        train_step = trainer.train_step

        def train_step_and_turn(self: Any, *args: Any, **kwargs: Any) -> None:
            train_step(self, *args, **kwargs)
            take_turn(sum(p.numel() for part in self.model_parts for p in part.parameters()))

        trainer.train_step = train_step_and_turn
        return build_config(args)

    script.build_config = with_turns
    script.main()


class Side:
    """One side's ranks, which do a step whenever they are told to."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.parameters = 0
        self.log = folder / f"{name}.log"  # what the ranks write to standard error
        shared = {
            "WORLD_SIZE": str(RANKS),
            "LOCAL_WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(THREADS),
        }
        with self.log.open("a") as log:
            self.processes = [
                subprocess.Popen(
                    [command[0], __file__, "--side", name, *command[1:]],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(RANKS)
            ]

    def step(self) -> float:
        """Let the ranks do a step, and stop them again: how many seconds it took."""
        started = time.perf_counter()
        for process in self.processes:
            assert process.stdin is not None
            process.send_signal(signal.SIGCONT)
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in self.processes:
            self._wait(process)
        seconds = time.perf_counter() - started
        for process in self.processes:
            process.send_signal(signal.SIGSTOP)
        return seconds

    def _wait(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                self.parameters = int(line.removeprefix(MARK))
                return
        status, tail = process.wait(), self.log.read_text()[-4000:]
        raise RuntimeError(f"{tail}\n{process.args!r} ended with {status}")

    def end(self) -> None:
        """End the ranks wherever they are."""
        for process in self.processes:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def measure(commands: dict[str, list[str]], steps: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each counted step of every side, which take turns step by step."""
    sides: dict[str, Side] = {}
    times: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for name, command in commands.items():  # one starts up after the other
            sides[name] = Side(name, command, folder)
            times[name].append(sides[name].step())
        sizes = {name: side.parameters for name, side in sides.items()}
        if len(set(sizes.values())) > 1:
            raise RuntimeError(f"the models have different numbers of parameters: {sizes}")
        for _ in range(steps - 1):
            for name, side in sides.items():
                times[name].append(side.step())
    finally:
        for side in sides.values():
            side.end()
    return {name: seconds[WARM:] for name, seconds in times.items()}


def measure_row(layout: str, precision: str, peer: list[str], steps: int) -> dict[str, Any]:
    """A row of the table. `peer`: its Python and its script, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {"ours": [sys.executable, *our_words(layout, precision, folder)]}
        if peer:
            commands["peer"] = [*peer, *peer_words(layout, precision, folder)]
        times = measure(commands, steps, Path(folder))
    row: dict[str, Any] = {"layout": f"{layout} {RANKS}", "precision": precision}
    for name, seconds in times.items():
        row[f"{name}_tokens_per_s"] = round(BATCH * LENGTH / statistics.median(seconds))
    if peer:
        pairs = zip(times["ours"], times["peer"], strict=True)
        row["ratio"] = round(statistics.median(theirs / ours for ours, theirs in pairs), 3)
        row["ratio_of_totals"] = round(sum(times["peer"]) / sum(times["ours"]), 3)
    row["seconds"] = {name: [round(value, 4) for value in seconds] for name, seconds in times.items()}
    return row


def versions(python: str, packages: list[str]) -> dict[str, str]:
    """The versions of `packages` under `python`."""
    code = "import json, sys, importlib.metadata as m; print(json.dumps([m.version(p) for p in sys.argv[1:]]))"
    found = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    return dict(zip(packages, json.loads(found.stdout), strict=True))


def main() -> None:
    """Measure the table, or be one rank of one side of a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=33, help=f"of each side; {WARM} of them uncounted")
    parser.add_argument("--peer-python", help="the interpreter of torchtitan's virtual environment")
    parser.add_argument("--peer-script", help="the script that trains with torchtitan")
    parser.add_argument("--row", nargs=2, metavar=("LAYOUT", "PRECISION"), help="only it: tp mixed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "parallel_speed.json")
    args = parser.parse_args()
    if (args.peer_python is None) != (args.peer_script is None):
        parser.error("--peer-python and --peer-script go together")
    if args.row and tuple(args.row) not in ROWS:
        parser.error(f"--row takes one of {', '.join(map(' '.join, ROWS))}")
    if args.steps <= WARM:
        parser.error(f"--steps must be above {WARM}")

    peer = [args.peer_python, args.peer_script] if args.peer_python else []
    rows = []
    for layout, precision in [tuple(args.row)] if args.row else ROWS:
        row = measure_row(layout, precision, peer, args.steps)
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "seconds"}), flush=True)
    result: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "ranks": RANKS,
        "threads_per_rank": THREADS,
        "tokens_per_step": BATCH * LENGTH,
        "steps_counted": args.steps - WARM,
        "versions": {"ours": versions(sys.executable, ["torch"])},
        "rows": rows,
    }
    if peer:
        result["versions"]["peer"] = versions(args.peer_python, ["torch", "torchtitan"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        sys.stdin.readline()  # the first turn holds the start
        (run_ours if sys.argv[2] == "ours" else run_peer)(sys.argv[3:])
    else:
        main()
