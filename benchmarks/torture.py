"""Breaks a run again and again and sees that it ends as if nothing had been.

    python benchmarks/torture.py                         # 100 faults on 2 ranks, half an hour on two cores
    python benchmarks/torture.py --faults 20 --ranks 4 parallel.tp=2
    python benchmarks/torture.py --kinds kill,stop

One run of a tiny recipe goes undisturbed. Another, under `trainwright launch torchrun`, is given faults at
random points. Nobody helps it: this program only starts the supervisor again where it has ended with a status
that says so (preempted: 75) or was killed, as an orchestrator would, and puts back a data file that it had cut.
At the end metrics.jsonl (but for times and memory) and the last checkpoint must be those of the undisturbed
run, bit for bit.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

PATIENCE = 180.0  # seconds after a fault within which the run has to train again
TICK = 0.002  # seconds between two looks
TIMED = {"tokens_per_s", "step_time_s", "data_time_s", "memory_gib", "mfu"}
MARK = "TRAINWRIGHT_TORTURE"  # in the environment of every process of the tortured run


def recipe_words(folder: Path, steps: int, more: list[str]) -> list[str]:
    """A model that trains some dozens of steps a second, whose shards are larger than its metrics."""
    return [
        *("data=text", f"data.paths=[{folder / 'corpus.txt'}]", "data.document=blank_line"),
        *(f"data.cache_dir={folder / 'cache'}", "data.tokenizer.vocab_size=300", "model.vocab_size=300"),
        *("model.hidden_size=128", "model.intermediate_size=256", "model.num_hidden_layers=2"),
        *("model.num_attention_heads=4", "model.num_key_value_heads=2", "train.seq_len=32"),
        *(f"train.steps={steps}", "train.global_batch_size=4", "train.micro_batch_size=2"),
        *(
            "checkpoint.every=10",
            "checkpoint.keep=3",
            "monitor.tensorboard=false",
            "monitor.sample_prompt=null",
        ),
        *(
            "resilience.hang_floor_s=4",
            "resilience.start_up_s=90",
            "platform=cpu",
            f"run.dir={folder / 'runs'}",
        ),
        *("launch.restarts=100000", "launch.shutdown_s=20", *more),
    ]


class Undone(AssertionError):
    """The run didn't come back by itself, or not as it should."""


class Tortured:
    """A run under the supervisor, seen from outside: its processes and its files."""

    def __init__(self, folder: Path, words: list[str], ranks: int) -> None:
        self.folder = folder / "runs" / "tortured"
        self.corpus = folder / "corpus.txt"
        self.mark = uuid.uuid4().hex
        launch = ["launch", "torchrun", f"launch.procs_per_node={ranks}", "run.name=tortured", *words]
        self.command = [sys.executable, "-m", "trainwright", *launch]
        self.log = (folder / "log.txt").open("a")
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark}
        self.start()

    def start(self) -> None:
        self.supervisor = subprocess.Popen(
            self.command, env=self.environment, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL
        )

    def workers(self) -> list[int]:
        """The processes of the ranks, by their environment."""
        found = []
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                with suppress(OSError):
                    names = (path / "environ").read_bytes()
                    if self.mark.encode() in names and b"\0RANK=" in names and (path / "cmdline").read_bytes():
                        found.append(int(path.name))
        return sorted(found)

    def events(self) -> list[dict[str, Any]]:
        return read(self.folder / "events.jsonl")

    def beginnings(self) -> int:
        return sum(event["event"] in ("start", "resume") for event in self.events())

    def step(self) -> int:
        """The last step of metrics.jsonl."""
        with suppress(OSError, ValueError, IndexError, KeyError):
            with (self.folder / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 4096))
                whole = [line for line in file.read().splitlines(keepends=True) if line.endswith(b"\n")]
            return int(json.loads(whole[-1])["step"])
        return 0

    def trains_again(self, beginnings: int) -> bool:
        """Whether it has begun again since there were so many beginnings, and has done a step."""
        if self.supervisor.poll() is not None:
            return True
        if self.beginnings() <= beginnings:
            return False
        began = [event.get("step", 0) for event in self.events() if event["event"] in ("start", "resume")][-1]
        return self.step() > int(began)

    def wait(self, until: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                raise Undone(f"{seconds:.0f} s without {what}")
            time.sleep(TICK)

    def ends(self, *statuses: int) -> None:
        try:
            status = self.supervisor.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Undone(f"the supervisor is still there {PATIENCE:.0f} s later") from None
        if status not in statuses:
            raise Undone(f"the supervisor ended with {status}, not {' or '.join(map(str, statuses))}")

    def newest(self) -> Path | None:
        """The newest checkpoint that has a manifest."""
        whole = sorted((self.folder / "checkpoints").glob("step_*/manifest.json"))
        whole = [path for path in whole if not path.parent.suffix]
        return whole[-1].parent if whole else None

    def kill_all(self) -> None:
        self.supervisor.kill()
        self.supervisor.wait()
        for pid in self.workers():
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


# The faults. Each returns when it has been dealt out; the run then has to come back by itself.


def kill(run: Tortured, draw: random.Random) -> None:
    """A rank is killed wherever it is."""
    time.sleep(draw.random() * 0.2)
    kill_one(run, draw)


def kill_one(run: Tortured, draw: random.Random, sign: signal.Signals = signal.SIGKILL) -> None:
    """Send one of the ranks a signal."""
    run.wait(lambda: run.workers() or run.supervisor.poll() is not None, "workers")
    with suppress(OSError, IndexError):  # it may have ended by itself in between: the run, at its end
        os.kill(draw.choice(run.workers()), sign)


def kill_in_save(run: Tortured, draw: random.Random) -> None:
    """A rank is killed while a checkpoint is being written."""
    folder = run.folder / "checkpoints"
    run.wait(lambda: any(folder.glob("*.partial")) or run.supervisor.poll() is not None, "a save")
    time.sleep(draw.random() * 0.05)
    kill_one(run, draw)


def kill_in_load(run: Tortured, draw: random.Random) -> None:
    """A rank is killed, and one of those that come after it before they have begun to train."""
    before, beginnings = set(run.workers()), run.beginnings()
    kill_one(run, draw)
    run.wait(lambda: set(run.workers()) - before or run.supervisor.poll() is not None, "new workers")
    end = time.monotonic() + 2 + draw.random() * 6
    run.wait(lambda: time.monotonic() > end or run.beginnings() > beginnings, "a beginning")
    kill_one(run, draw)


def flip_a_bit(run: Tortured, draw: random.Random) -> None:
    """The newest checkpoint is damaged when a rank is killed."""
    damage(
        run, draw, lambda data, at: data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    )


def tear(run: Tortured, draw: random.Random) -> None:
    """The newest checkpoint lacks the end of a file when a rank is killed."""
    damage(run, draw, lambda data, at: data[:at])


def damage(run: Tortured, draw: random.Random, change: Callable[[bytes, int], bytes]) -> None:
    """Change a file of the newest checkpoint at a random place, and kill a rank."""
    with suppress(OSError):  # deleted meanwhile: then a plain kill
        if newest := run.newest():
            file = draw.choice([path for path in sorted(newest.rglob("*")) if path.is_file()])
            data = file.read_bytes()
            file.write_bytes(change(data, draw.randrange(len(data))))
    kill_one(run, draw)


def fill_the_disk(run: Tortured, draw: random.Random) -> None:
    """Files can't grow for a while: saves fail, the run goes on; then a rank is killed."""
    limit = (run.folder / "metrics.jsonl").stat().st_size + 300_000
    for pid in run.workers():
        with suppress(OSError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    failed = count(run, "checkpoint_failed")
    run.wait(
        lambda: count(run, "checkpoint_failed") > failed or run.supervisor.poll() is not None, "a failed save"
    )
    kill_one(run, draw)


def count(run: Tortured, event: str) -> int:
    """How often something has happened."""
    return sum(one["event"] == event for one in run.events())


def stop(run: Tortured, draw: random.Random) -> None:
    """A rank is stopped: it hangs, and so do the others."""
    kill_one(run, draw, signal.SIGSTOP)


def term(run: Tortured, draw: random.Random) -> None:
    """The node is asked back; the run is started again afterwards."""
    run.supervisor.send_signal(draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    run.ends(75, 0)
    if run.supervisor.returncode == 75:
        run.start()


def kill_the_supervisor(run: Tortured, draw: random.Random) -> None:
    """The supervisor is killed: its workers must end too. It is started again."""
    run.supervisor.kill()
    run.supervisor.wait()
    run.wait(lambda: not run.workers(), "the end of the workers")
    run.start()


def cut_the_data(run: Tortured, draw: random.Random) -> None:
    """A data file loses its end: the run refuses to go on. The file is put back and the run started again."""
    whole = run.corpus.read_bytes()
    stat = run.corpus.stat()
    os.truncate(run.corpus, draw.randrange(len(whole) // 2, len(whole)))
    kill_one(run, draw)
    run.ends(2)
    with run.corpus.open("r+b") as file:
        file.write(whole)
    os.utime(run.corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run.start()


FAULTS: dict[str, tuple[Callable[[Tortured, random.Random], None], int]] = {  # and how often, of all
    "kill": (kill, 30),
    "kill_in_save": (kill_in_save, 16),
    "kill_in_load": (kill_in_load, 12),
    "flip_a_bit": (flip_a_bit, 10),
    "tear": (tear, 6),
    "fill_the_disk": (fill_the_disk, 6),
    "stop": (stop, 8),
    "term": (term, 6),
    "kill_the_supervisor": (kill_the_supervisor, 4),
    "cut_the_data": (cut_the_data, 2),
}


def torture(
    folder: Path, faults: int, ranks: int, draw: random.Random, more: list[str], kinds: list[str]
) -> dict[str, Any]:
    """Run twice, undisturbed and not; returns what was seen. Raises Undone where a hand would be needed."""
    steps = 60 * faults + 60
    write_corpus(folder / "corpus.txt")
    words = recipe_words(folder, steps, more)
    undisturbed(folder, words, ranks)
    dealt = deal(kinds, faults, draw)
    run = Tortured(folder, words, ranks)
    recovered: Counter[str] = Counter()
    seconds: list[float] = []
    try:
        run.wait(lambda: run.step() > 0, "a first step")
        for number, kind in enumerate(dealt, start=1):
            target = run.step() + draw.randrange(1, 40)
            run.wait(partial(reached, run, target), f"step {target}")
            if run.supervisor.poll() is not None:
                raise Undone(f"the run ended with {run.supervisor.returncode} before fault {number}")
            began, beginnings = time.monotonic(), run.beginnings()
            try:
                FAULTS[kind][0](run, draw)
                run.wait(partial(run.trains_again, beginnings), "training again")
            except Undone as undone:
                raise Undone(f"fault {number} of {faults}, {kind} at step {run.step()}: {undone}") from None
            recovered[kind] += 1
            seconds.append(time.monotonic() - began)
            print(f"fault={number} kind={kind} step={run.step()} seconds={seconds[-1]:.1f}", flush=True)
        run.supervisor.wait(3600)
        if run.supervisor.returncode != 0:
            raise Undone(f"the run ended with {run.supervisor.returncode}")
    finally:
        run.kill_all()
    compare(folder / "runs" / "undisturbed", folder / "runs" / "tortured")
    return {
        "ranks": ranks,
        "overrides": more,
        "steps": steps,
        "faults": sum(recovered.values()),
        "recovered": dict(recovered),
        "beginnings": run.beginnings(),
        "checkpoints_passed_over": count(run, "checkpoint_passed_over"),
        "failed_saves": count(run, "checkpoint_failed"),
        "hangs_found": count(run, "hang"),
        "seconds_to_train_again": {
            "median": round(statistics.median(seconds), 1),
            "most": round(max(seconds), 1),
        },
        "same_metrics": True,
        "same_final_weights_and_optimizer": True,
    }


def reached(run: Tortured, step: int) -> bool:
    """Whether the run is there, or has ended."""
    return run.step() >= step or run.supervisor.poll() is not None


def deal(kinds: list[str], faults: int, draw: random.Random) -> list[str]:
    """So many faults in any order: as many of each kind as its share says, and of each one if there is room."""
    weights = [FAULTS[kind][1] for kind in kinds]
    counts = [max(1, faults * weight // sum(weights)) for weight in weights]
    dealt = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    dealt += draw.choices(kinds, weights, k=max(0, faults - len(dealt)))
    return draw.sample(dealt, faults)


def write_corpus(path: Path) -> None:
    """Paragraphs of random words."""
    draw = random.Random(0)
    words = [f"word{number}" for number in range(40)]
    paragraphs = (" ".join(draw.choices(words, k=draw.randint(3, 60))) for _ in range(2000))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(paragraphs) + "\n")


def undisturbed(folder: Path, words: list[str], ranks: int) -> None:
    """The run that the other one has to equal."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*torchrun, "-m", "trainwright", "train", "run.name=undisturbed", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "undisturbed.txt").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)


def compare(whole: Path, ours: Path) -> None:
    """Raise Undone unless both runs have the same metrics and the same last checkpoint, its progress too."""
    expected, found = (
        [{k: v for k, v in line.items() if k not in TIMED} for line in read(folder / "metrics.jsonl")]
        for folder in (whole, ours)
    )
    for a, b in zip(expected, found, strict=False):
        if a != b:
            raise Undone(f"the undisturbed run has {a} and the tortured one {b}")
    if len(expected) != len(found):
        raise Undone(f"the undisturbed run has {len(expected)} steps and the tortured one {len(found)}")
    last = sorted((whole / "checkpoints").iterdir())[-1].name
    was, came = (
        json.loads((folder / "checkpoints" / last / "progress.json").read_text()) for folder in (whole, ours)
    )
    if was != came:
        raise Undone(f"the undisturbed run's last checkpoint is at {was} and the tortured one's at {came}")
    a, b = (tensors(folder / "checkpoints" / last) for folder in (whole, ours))
    if a.keys() != b.keys():
        raise Undone(f"the last checkpoints have other tensors: {a.keys() ^ b.keys()}")
    different = [name for name in a if a[name].tobytes() != b[name].tobytes()]
    if different:
        raise Undone(f"the last checkpoints differ in {different}")


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    kept: dict[str, Any] = FileSystemReader(checkpoint / "state").read_metadata().state_dict_metadata
    state = {name: torch.empty(told.size, dtype=told.properties.dtype) for name, told in kept.items()}
    load(state, storage_reader=FileSystemReader(checkpoint / "state"), no_dist=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def main() -> None:
    """Torture a run and write down what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(FAULTS), help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--folder", type=Path, help="kept afterwards; a temporary one unless given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "torture.json")
    parser.add_argument("more", nargs="*", help="overrides of the recipe")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        seen = torture(
            folder, args.faults, args.ranks, random.Random(args.seed), args.more, args.kinds.split(",")
        )
    print(json.dumps(seen, indent=1))
    args.out.write_text(json.dumps({"seed": args.seed, **seen}, indent=1) + "\n")


if __name__ == "__main__":
    main()
