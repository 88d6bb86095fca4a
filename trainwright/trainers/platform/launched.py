"""What a launcher, and a rank whose peers are gone, know of each device. No torch."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence

from trainwright.errors import RunFailed
from trainwright.trainers.platform.device_errors import Known
from trainwright.trainers.platform.environment import device_of
from trainwright.trainers.platform.neuron_cores import ranks_by_cores
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS

# What a library says on stderr where it ends the process. Elsewhere stderr stays what it is, as a terminal.
HEARD: dict[str, Sequence[Known]] = {"neuron": NEURON_ERRORS}

# What is said, in RuntimeErrors, where other ranks are gone or late: by gloo and torch's store, NCCL, Neuron.
LOST_BY_DEVICE = {
    "cpu": r"Connection (closed by peer|reset by peer|refused)|Broken pipe|failed to recv|pair closure"
    r"|Timed out waiting|socket has timed out|wait timeout after|waiting for clients",
    "cuda": r"ncclRemoteError|ncclSystemError|collective operation timeout",
    "neuron": r"NRT_TIMEOUT|HW_ERR_COLLECTIVES|suspected hang in collectives",
}
LOST = re.compile("|".join(LOST_BY_DEVICE.values()), re.IGNORECASE)

ACCELERATORS = "import torch; print(torch.accelerator.device_count())"
# TorchNeuron shows one core, whatever there is, before the ranks have met.
COUNTS: dict[str, Callable[[], int]] = {"cpu": lambda: 1, "neuron": ranks_by_cores}


def ranks_of_node(platform: str) -> int:
    """How many ranks a node gets: one for each device, of a recipe's `platform`.

    Raises:
        BadRequest, RunFailed: they can't be counted.
    """
    device = device_of(platform)
    if platform == "auto" and device == "cpu":  # torch may know of devices that have no file
        return _accelerators()
    return COUNTS.get(device, _accelerators)()


def _accelerators() -> int:
    """Asked in a process that ends: the supervisor stays without torch, and no device stays in use."""
    asked = subprocess.run([sys.executable, "-c", ACCELERATORS], capture_output=True, text=True)
    if asked.returncode != 0 or not asked.stdout.strip().isdigit():
        why = (asked.stderr.strip() or "no answer").splitlines()[-1]
        raise RunFailed(f"this node's devices can't be counted, give launch.procs_per_node: {why}")
    return max(1, int(asked.stdout))
