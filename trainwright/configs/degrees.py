"""The degrees of parallelism of a run, once its number of ranks is known."""

import os
from typing import NamedTuple

from trainwright.configs.schema import ParallelConfig


class Degrees(NamedTuple):
    """The size of each axis of the mesh of ranks; their product is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def data(self) -> int:
        """How many ways the global batch is split."""
        return self.dp_replicate * self.dp_shard


def world_size() -> int:
    """The number of ranks that the launcher (torchrun, accelerate launch) has started; 1 without one.

    Raises:
        ValueError: WORLD_SIZE in the environment is no number.
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_degrees(parallel: ParallelConfig, ranks: int) -> Degrees:
    """The mesh of `ranks` ranks: `dp_shard=-1` takes what is left, `zero=0` replicates what it would shard."""
    left = ranks // (parallel.dp_replicate * parallel.tp)
    shard = left if parallel.dp_shard == -1 else parallel.dp_shard
    if parallel.zero == 0:
        return Degrees(parallel.dp_replicate * shard, 1, parallel.tp)
    return Degrees(parallel.dp_replicate, shard, parallel.tp)
