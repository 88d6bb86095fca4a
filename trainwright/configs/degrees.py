"""The degrees of parallelism of a run, once its number of ranks is known."""

import math
import os
from typing import NamedTuple

from trainwright.configs.schema import ParallelConfig


class Degrees(NamedTuple):
    """The size of each axis of the mesh of ranks, outermost first; their product is the number of ranks."""

    pp: int = 1
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
    left = ranks // (parallel.pp * parallel.dp_replicate * parallel.tp)
    shard = left if parallel.dp_shard == -1 else parallel.dp_shard
    if parallel.zero == 0:
        return Degrees(parallel.pp, parallel.dp_replicate * shard, 1, parallel.tp)
    return Degrees(parallel.pp, parallel.dp_replicate, shard, parallel.tp)


# Stages of each rank, unless `parallel.pp_stages` says how many.
STAGES = {"1f1b": 1, "interleaved_1f1b": 2, "zero_bubble": 1}


def stages_per_rank(parallel: ParallelConfig) -> int:
    """How many stages of the pipeline each rank has."""
    return parallel.pp_stages or STAGES[parallel.pp_schedule]


def rows_in_a_batch(lanes: int, batch_size: int, ranks: int) -> int:
    """The most sequences that any of `ranks` data-parallel ranks has in any batch: all fill theirs up to it.

    A rank's run of ceil(lanes / ranks) lanes has at most a turn's share of them, rounded up, in each turn.
    """
    sequences = max(1, batch_size // lanes)  # of each lane
    return sequences * math.ceil(min(lanes, batch_size) / ranks)
