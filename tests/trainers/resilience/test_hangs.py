"""Real launchers, real hangs: the run names the rank, starts again and comes to its end."""

import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = str(Path(__file__).with_name("hanging.py"))
RANKS = 3
# As our own launcher has it: stopped processes would stay for the time to save.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1", "--shutdown-timeout=100"]
TORCHRUN += [f"--nproc-per-node={RANKS}"]


def run(tiny: list[str], where: Path, way: str, phase: str, rank: int, *options: str, **variables: str):
    """The launcher's process and what it printed, after its end."""
    words = [*tiny, "platform=cpu", "train.steps=40", "train.validate_every=null", "checkpoint.every=10"]
    words += ["train.global_batch_size=6", "resilience.hang_floor_s=3", "monitor.every=20"]
    hang = {
        "HANG": way,
        "HANG_IN": phase,
        "HANG_RANK": str(rank),
        "HANG_STEP": "25",
        "HANGS": str(where / "hung"),
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), **hang, **variables}
    process = subprocess.Popen(
        [*TORCHRUN, *options, PROGRAM, "train", *words],
        env=environment,
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=240)
    finally:
        for pid in workers(where):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
    return process, out, err


def workers(folder: Path) -> list[int]:
    """The processes of the run in `folder` that there still are."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if PROGRAM.encode() in (words := entry.read_bytes()) and str(folder).encode() in words:
                found.append(int(entry.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("way", "phase", "rank", "why"),
    [
        ("stopped", "forward_backward", 1, r"its beats stopped \d+ s ago, last seen in step \d+ \(\w+\)"),
        ("asleep", "data", 2, r"it is in no collective, but in step 25 \(data\) at .*hanging\.py:\d+ \(.*"),
        (
            "spinning",
            "forward_backward",
            0,
            r"it is in no collective, but in step 25 \(forward_backward\) at .*",
        ),
        ("locked", "forward_backward", 1, r"its beats stopped \d+ s ago, last seen in step \d+ \(\w+\)"),
    ],
)
def test_a_hang_is_found_and_the_run_goes_on(
    tiny: list[str], tmp_path: Path, way: str, phase: str, rank: int, why: str
):
    process, out, err = run(tiny, tmp_path, way, phase, rank, "--standalone")
    assert process.returncode == 0, err
    check(tmp_path, out, err, rank, why)
    folder = tmp_path / "runs" / "tiny" / "stacks"
    written = {path.name for path in folder.iterdir() if path.stat().st_size}
    assert written == {f"rank_{r:05d}.txt" for r in range(RANKS) if (way, r) != ("stopped", rank)}
    if way != "stopped":
        assert "hanging.py" in (folder / f"rank_{rank:05d}.txt").read_text()


def test_the_rank_that_hosts_the_store_may_be_the_one_that_stopped(tiny: list[str], tmp_path: Path):
    process, out, err = run(
        tiny,
        tmp_path,
        "stopped",
        "forward_backward",
        0,
        *("--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert process.returncode == 0, err
    check(tmp_path, out, err, 0, "the store in its process doesn't answer")


def check(where: Path, out: str, err: str, rank: int, why: str) -> None:
    (line,) = [line for line in err.splitlines() if line.startswith("trainwright:")]
    stacks = re.escape(str(where / "runs" / "tiny" / "stacks"))
    wanted = rf"trainwright: rank \d: no progress for (\d+) s in step 2\d \(\w+\); rank {rank} straggles: {why}"
    match = re.fullmatch(rf"{wanted}; stacks are in {stacks}", line)
    assert match, line
    happened = events(where / "runs" / "tiny")
    (hang,) = [event for event in happened if event["event"] == "hang"]
    assert hang["straggler"] == rank
    began, found = float((where / "hung").read_text()), at(hang)
    again = next(at(event) for event in happened if event["event"] in ("start", "resume") and at(event) > found)
    print(f"found after {found - began:.1f} s, in training again after {again - began:.1f} s")
    assert began < found < again < began + 120  # a busy machine's imports are in it
    assert "step=40 " in out
    assert workers(where) == []


def at(event: dict) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
