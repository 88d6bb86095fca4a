"""A rank among ranks that aren't there, on the device that they would have."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from trainwright.configs.schema import ParallelConfig
from trainwright.trainers.parallel.ranks import Ranks, stand
from trainwright.trainers.platform.base import Platform


class Rehearsed(Platform):
    """The ways of the platform that a run is for, on the host's tensors.

    FSDP's and the operators' own ways differ between devices in their speed only.
    """

    backend = "fake"

    def __init__(self, target: type[Platform]) -> None:
        self.name = target.name
        self.attention = target.attention
        self.sends_directly = target.sends_directly
        self.device = torch.device("cpu")

    def describe(self) -> str:
        """What it stands for."""
        return f"{self.name}, rehearsed"

    def memory_gib(self) -> float:
        """Nothing is held."""
        return 0.0

    def free_memory(self) -> int:
        """Nothing can be had."""
        return 0


@contextmanager
def pretended_ranks(parallel: ParallelConfig, size: int, rank: int) -> Iterator[Ranks]:
    """Stand as `rank` among `size` ranks, whose collectives return at once and carry nothing.

    The process must be in no process group, and is in none afterwards.
    """
    if size == 1:
        yield Ranks()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield stand(parallel, "cpu", local_rank=0)
    finally:
        dist.destroy_process_group()
