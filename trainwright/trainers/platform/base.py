"""What differs between devices, and nothing else: one small object per device."""

from abc import ABC, abstractmethod

import torch


class Platform(ABC):
    """A device as the trainer sees it. Nothing outside this folder asks which one it is."""

    name: str  # the recipe's word for it
    backend: str  # the process group's backend string
    attention: str  # which of models.attention.KERNELS it trains with
    device: torch.device
    sends_directly = False  # ranks that send each other parts are faster than its gathers and reduce-scatters

    def prepare(self) -> None:
        """Settings of the process; before the first tensor."""

    def synchronize(self) -> None:
        """Wait for what was queued on the device."""

    @abstractmethod
    def describe(self) -> str:
        """The device in a few words, for config.yaml and the report."""

    @abstractmethod
    def memory_gib(self) -> float:
        """The most memory that the run has held on the device so far, in GiB."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """The device's published dense matrix-multiply rate in FLOP/s; None where there is no such figure."""
        return None
