"""What the supervisor does when a worker's device fails, by what the device's library says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere orphans can't be taken in"),
]

SUPERVISED = Path(__file__).with_name("supervised.py")
WORDS = ["platform=cpu", "launch.procs_per_node=2", "launch.restarts=1", "launch.relaunches=0"]


def launch(says: str, tiny: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    there = {**os.environ, "OMP_NUM_THREADS": "1", "WORKER": "breaking.py", "SAYS": says, **environment}
    words = [*tiny, *WORDS, "health.check=false", "train.micro_batch_size=1"]
    return subprocess.run(
        [sys.executable, SUPERVISED, "launch", "torchrun", *words],
        cwd=folder,
        env=there,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("says", "status", "sentence"),
    [
        (
            "nrt_execute: NRT_EXEC_HW_ERR_HBM_UE",
            77,
            "rank 1: the device's memory had an error that nothing corrects (NRT_EXEC_HW_ERR_HBM_UE, 1201): "
            "replace the node; it said: nrt_execute: NRT_EXEC_HW_ERR_HBM_UE (bad node)",
        ),
        (
            "INFER_ERROR_SUBTYPE_NUMERICAL",
            76,
            "rank 1: a graph made a NaN; the device may go on to tell of it until the process ends "
            "(NRT_EXEC_COMPLETED_WITH_NUM_ERR, 1003): lower optim.lr",
        ),
    ],
)
def test_what_a_restart_cannot_mend_ends_the_run(
    says: str, status: int, sentence: str, tiny: list[str], tmp_path
):
    done = launch(says, tiny, tmp_path)
    assert done.returncode == status, done.stderr
    assert f"trainwright: the run ended with status {status}: {sentence}" in done.stderr
    assert done.stdout.count("event=start") == 1


def test_a_failure_that_may_pass_is_tried_again(tiny: list[str], tmp_path: Path):
    done = launch("NRT_NETWORK_PROXY_FAILURE", tiny, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "the network between the nodes failed (NRT_NETWORK_PROXY_FAILURE, 1206): start again" in done.stderr
    assert done.stdout.count("event=start") == 2  # no checkpoint before the third step


def test_a_library_that_ends_the_process_is_heard(tiny: list[str], tmp_path: Path):
    done = launch("[MLA 0][NC 0] DMA TX engine 0 is in an abort state", tiny, tmp_path, KILLED="1")
    assert done.returncode == 77, done.stderr
    assert (
        "trainwright: the run ended with status 77: a DMA engine stopped (NRT_EXEC_HW_ERR_DMA_A" in done.stderr
    )
    assert "\n[MLA 0][NC 0] DMA TX engine 0 is in an abort state\n" in f"\n{done.stderr}"
    assert done.stdout.count("event=start") == 1


def test_a_nan_of_the_devices_may_be_its_batchs(tiny: list[str], tmp_path: Path):
    again = [*tiny, "resilience.pass_over_batch=true"]
    done = launch("INFER_ERROR_SUBTYPE_NUMERICAL", again, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "or start again to see whether it is the batch" in done.stderr
    assert done.stdout.count("event=start") == 2
