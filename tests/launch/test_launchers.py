"""Real launchers, real processes: what the console shows when ranks fail."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FAILING = str(Path(__file__).with_name("failing.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# --multi_gpu makes accelerate start several processes, on a machine without a GPU too; --cpu starts one.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
ACCELERATE += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**ENVIRONMENT, **environment}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def said(stderr: str) -> list[str]:
    """What trainwright says, and any warning of Python's or C++'s beside it."""
    lines = [line for line in stderr.splitlines() if re.match(r"trainwright:|\[[WE]\d{4} |.*Warning", line)]
    return [line for line in lines if "hostname of the client socket" not in line]  # a slow name service


def exits(stderr: str) -> dict[int, int]:
    """The exit status of each rank that torchrun's summary shows."""
    shown = re.findall(r"rank      : (\d+) .*\n\s*exitcode  : (-?\d+)", stderr)
    return {int(rank): int(status) for rank, status in shown}


def reasons(stderr: str) -> set[str]:
    """What torchrun's summary says of its ranks."""
    return set(re.findall("traceback : (.*)", stderr))


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_wrong_recipe_is_one_line_in_all(launcher: list[str], tmp_path: Path):
    done = launch(*launcher, "-m", "trainwright", "train", "train.seq_len=4096", cwd=tmp_path)
    (line,) = said(done.stderr)
    assert re.fullmatch(r"trainwright: rank [01]: train.seq_len=4096 is above model.max_position_.*", line)
    # A rank that is still starting when the first has ended gets the launcher's SIGTERM and says nothing:
    # killed by it, or ended with 75 by its own handler, of which torchrun knows no reason.
    late = {
        reason for reason in reasons(done.stderr) if reason.startswith(("Signal 15", "To enable traceback"))
    }
    assert reasons(done.stderr) - late == {line.removeprefix("trainwright: ")}
    assert set(exits(done.stderr).values()) - {-15, 75} == {2}
    assert done.returncode == 1


def test_the_rank_with_the_cause_speaks_for_those_that_wait_for_it(tmp_path: Path):
    done = launch(*TORCHRUN, FAILING, "bad_request", cwd=tmp_path)
    assert said(done.stderr) == ["trainwright: rank 1: data.paths: rank 1's disk has no book.txt"]
    assert reasons(done.stderr) == {"rank 1: data.paths: rank 1's disk has no book.txt"}
    assert exits(done.stderr) == {0: 2, 1: 2}


def test_one_traceback_when_every_rank_has_the_same_bug(tmp_path: Path):
    done = launch(*TORCHRUN, FAILING, "bug", cwd=tmp_path)
    (line,) = said(done.stderr)
    assert re.fullmatch(r"trainwright: rank [01]:", line)
    assert done.stderr.count("ValueError: no such thing\n") == 1 + len(exits(done.stderr))  # and the summary's
    assert "Error executing job" not in done.stderr  # Hydra's preamble
    assert set(exits(done.stderr).values()) == {1}


def test_a_killed_rank_leaves_one_sentence_and_no_traceback(tmp_path: Path):
    done = launch(*TORCHRUN, FAILING, "killed", cwd=tmp_path)
    (line,) = said(done.stderr)
    assert line.startswith(
        "trainwright: rank 0: lost the other ranks, which usually means that one of them was"
    )
    assert "Signal 9 (SIGKILL)" in done.stderr.split("Root Cause")[1]
    assert exits(done.stderr) == {0: 1, 1: -9}


def test_rank_0_may_be_killed_with_the_store_that_it_hosts(tmp_path: Path):
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "VICTIM": "0"}
    done = launch(*TORCHRUN, FAILING, "killed", cwd=tmp_path, **own_store)
    (line,) = said(done.stderr)
    assert line.startswith("trainwright: rank 1: lost the other ranks")
    assert "frame #" not in done.stderr  # C++'s
    assert exits(done.stderr) == {0: -9, 1: 1}


def test_an_interrupt_is_said_once(tmp_path: Path):
    process = subprocess.Popen(
        [*TORCHRUN, FAILING, "waiting"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    try:
        assert {process.stdout.readline() for _ in range(2)} == {"rank 0 waits\n", "rank 1 waits\n"}
        process.send_signal(signal.SIGINT)
        assert said(process.communicate(timeout=60)[1]) == ["trainwright: interrupted"]
    finally:
        process.terminate()
        process.wait()
