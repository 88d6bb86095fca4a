"""The `neuron` platform: AWS Trainium 2 and 3 through TorchNeuron, a device of stock PyTorch."""

import ctypes
import importlib
import os
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainwright.errors import BadRequest
from trainwright.trainers.platform.base import Platform, ToolReport
from trainwright.trainers.platform.neuron_cores import cores_in_one
from trainwright.trainers.platform.neuron_errors import NEURON_ERRORS
from trainwright.trainers.platform.neuron_tools import collectives, device_listing, hardware_counters
from trainwright.trainers.platform.presets import ROUNDS, SEED_BITS

# AWS Neuron's documentation, "Trainium2 Architecture" and "Trainium3 Architecture": dense FLOP/s of a chip.
PEAKS = {
    "trn2": {torch.bfloat16: 667e12, torch.float32: 181e12},
    "trn3": {torch.bfloat16: 671e12, torch.float32: 183e12},
}
CORES = 8  # of such a chip; a logical core is one or two of them
INSTANCE = Path("/sys/devices/virtual/dmi/id/product_name")  # on EC2 it reads "trn2.48xlarge"
COMPILER = "neuronx-cc"
M_ARENA_MAX, ARENAS = -8, 64  # malloc.h; the number is that of the vendor's training scripts


class Neuron(Platform):
    """A logical NeuronCore a process.

    It can be used from the moment that the process group is there, and then under one index only: so none is
    ever named, and none is set.
    """

    name = "neuron"
    backend = "cpu:gloo,neuron:neuron"  # objects, votes and checkpoints go over the host
    attention = "sdpa"
    # That of April 2026 asserts that there is no divisor, and takes the learning rate as a Python number.
    fuses_adamw = False
    compile_backend = "neuron"
    compiles_any_shape = False
    failures = NEURON_ERRORS

    def __init__(self) -> None:
        self.device = torch.device(self.name)

    @classmethod
    def register(cls) -> Exception | None:
        """Import TorchNeuron where torch hasn't by itself, as with TORCH_DEVICE_BACKEND_AUTOLOAD=0."""
        if not hasattr(torch, cls.name):
            try:
                importlib.import_module("torch_neuronx")
            except (ImportError, OSError, RuntimeError) as error:  # PyPI's placeholder raises, too
                return error
        return None

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device)

    @property
    def _properties(self) -> Any:
        return self._module.get_device_properties(self._module.current_device())

    def prepare(self) -> None:
        """Bound the host's memory: each of the runtime's many threads may get an arena of malloc's own.

        MALLOC_ARENA_MAX would do the same, if it were set before the process starts.

        Raises:
            BadRequest: the environment says nonsense of the cores.
        """
        if "MALLOC_ARENA_MAX" not in os.environ and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(M_ARENA_MAX, ARENAS)
        cores_in_one()

    def round_stochastically(self, seed: int) -> None:
        """By the Neuron runtime, wherever it rounds; it reads these as it starts and as it loads a program.

        `presets` has them, too: here they are given to a run that wasn't started by the command line.

        Raises:
            BadRequest: the environment says otherwise.
        """
        if os.environ.setdefault(ROUNDS, "1") != "1":
            raise BadRequest(
                f"precision.rounding=hardware and {ROUNDS}={os.environ[ROUNDS]} in the environment contradict "
                "each other: unset it, or use precision.rounding=optimizer"
            )
        os.environ.setdefault("NEURON_RT_STOCHASTIC_ROUNDING_SEED", str(seed % (1 << SEED_BITS)))

    def synchronize(self) -> None:
        """Wait for the core."""
        self._module.synchronize()

    def describe(self) -> str:
        """What the core and the machine call themselves."""
        return f"{self._properties.name} ({_instance() or 'unknown instance'}, LNC {cores_in_one()})"

    def memory_gib(self) -> float:
        """Peak memory that PyTorch's allocator reserved; compiled programs take theirs beside it."""
        return float(self._module.max_memory_reserved()) / 2**30

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """A logical core's share of its chip's."""
        chip = PEAKS.get(_instance().partition(".")[0], {}).get(dtype)
        return None if chip is None else chip * cores_in_one() / CORES

    def kind(self) -> str:
        """The core, and the compiler, which decides in which order a product is added up."""
        compiler = "unknown"
        with suppress(PackageNotFoundError):
            compiler = version(COMPILER)
        return f"{self.describe()}, {COMPILER} {compiler}, torch {torch.__version__}"

    def free_memory(self) -> int:
        """Of the core's memory what PyTorch's allocator hasn't given out; programs may have some of it."""
        return int(self._properties.total_memory - self._module.memory_allocated())

    def give_back(self) -> None:
        """Empty PyTorch's cache, and forget that the peak was ours."""
        self._module.empty_cache()
        self._module.reset_peak_memory_stats()

    def tools_before_use(self) -> list[ToolReport]:
        """nccom-test, which takes all cores."""
        return [collectives()]

    def tools(self, *, first_on_node: bool, thorough: bool) -> list[ToolReport]:
        """neuron-ls and neuron-monitor, which are quick and speak of the whole node."""
        return [device_listing(), hardware_counters()] if first_on_node else []


def _instance() -> str:
    """The machine's EC2 instance type, or whatever it is called; empty where nothing says."""
    with suppress(OSError):
        return INSTANCE.read_text().strip()
    return ""
