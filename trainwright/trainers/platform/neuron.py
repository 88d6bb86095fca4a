"""The `neuron` platform: AWS Trainium 2 and 3 through TorchNeuron, the device of stock PyTorch."""

import importlib
import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from trainwright.trainers.platform.base import Platform

SEED_BITS = 32  # of the runtime's own seed


class Neuron(Platform):
    """NeuronCores, one logical core a process.

    A process may use the device only when its process group is there, and only the core that it then has: so
    no index is ever named here, and none is set.
    """

    name = "neuron"
    backend = "cpu:gloo,neuron:neuron"
    attention = "sdpa"

    def __init__(self) -> None:
        self.device = torch.device("neuron")

    @classmethod
    def register(cls) -> None:
        """Import TorchNeuron where torch hasn't by itself, as with TORCH_DEVICE_BACKEND_AUTOLOAD=0."""
        if not hasattr(torch, "neuron"):
            with suppress(ImportError):
                importlib.import_module("torch_neuronx")

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device)

    def round_stochastically(self, seed: int) -> None:
        """By the Neuron runtime, in all its conversions to lower precision; it reads these when it starts."""
        os.environ["NEURON_RT_STOCHASTIC_ROUNDING_EN"] = "1"
        os.environ["NEURON_RT_STOCHASTIC_ROUNDING_SEED"] = str(seed % (1 << SEED_BITS))

    def synchronize(self) -> None:
        """Wait for the core."""
        self._module.synchronize()

    def describe(self) -> str:
        """The core's name."""
        return str(self._module.get_device_properties(self._module.current_device()).name)

    def memory_gib(self) -> float:
        """Peak memory that PyTorch's allocator gave out."""
        return float(self._module.max_memory_allocated()) / 2**30

    def free_memory(self) -> int:
        """What the allocator hasn't given out of the core's share of the memory."""
        total = self._module.get_device_properties(self._module.current_device()).total_memory
        return int(total - self._module.memory_allocated())

    def allocate(self, size: int) -> Tensor:
        """As int32: the device has no int64."""
        return torch.empty(size // 4, dtype=torch.int32, device=self.device)

    def give_back(self) -> None:
        """Empty PyTorch's cache."""
        self._module.empty_cache()
