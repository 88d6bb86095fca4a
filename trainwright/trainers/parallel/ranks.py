"""A process among those of its run: the process group, and the mesh of ranks with named axes."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from trainwright.configs.degrees import Degrees, resolve_degrees, world_size
from trainwright.configs.schema import ParallelConfig
from trainwright.errors import BadRequest
from trainwright.trainers.platform.base import Platform

TIMEOUT = timedelta(minutes=30)  # of every collective; the first may wait for another rank to index its data
HOST = torch.device("cpu")
# Outermost first: tensor-parallel peers are neighbours, and a pipeline may reach from node to node.
AXES = ("pp", "dp_replicate", "dp_shard", "tp")

ALONE = Degrees()

_round: str | None = None  # what the ranks that this process has met share


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. `Ranks()` is a process on its own, without a process group.

    mesh: the ranks as an array of shape (pp, dp_replicate, dp_shard, tp), its axes named by AXES.
    data_rank, data_ranks: which share of every global batch is this rank's; the same for the ranks that work on
    it together, the pipeline's and the tensor-parallel ones.
    tp_rank: which part of every cut weight is this rank's. pp_rank: its place in the pipeline.
    peers: the group of the ranks with this data_rank; None where this is the only one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    degrees: Degrees = ALONE
    data_rank: int = 0
    data_ranks: int = 1
    tp_rank: int = 0
    pp_rank: int = 0
    mesh: DeviceMesh | None = None
    peers: dist.ProcessGroup | None = None
    group: dist.ProcessGroup | None = None  # that they communicate in; None is torch's default group

    @property
    def first(self) -> bool:
        """Whether this is rank 0: the one that speaks and writes the run's files."""
        return self.rank == 0

    @property
    def reads(self) -> bool:
        """Whether this is the first of the ranks with its data_rank: the one that reads and counts for them."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def nodes(self) -> int:
        """How many machines the ranks are on, where all have as many as this one."""
        return max(1, self.size // int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of every rank's `numbers`, in place."""
        if self.size > 1:
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def share(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; what the others bring doesn't matter."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group, device=HOST)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def aside(self) -> "Ranks":
        """The same ranks with a process group of their own on the host, for a thread beside the training."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    @contextmanager
    def one_a_node_first(self) -> Iterator[None]:
        """The body runs on each node's first rank, then on the others, which find its caches filled."""
        if self.local_rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            dist.barrier()


def attempt() -> str:
    """What tells this start of the ranks from earlier ones in the same store.

    Where torchrun's own store is the ranks', that is its count of restarts. Otherwise each start has a store of
    its own, and the count must not be used: a node that starts again because another came doesn't count that.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if shared else "0"


def this_round() -> str:
    """What the ranks of this start have in common with no other start, in a store that outlives them.

    It is drawn when the ranks meet. Before that there is only the port where they will, which may come again.
    """
    return _round or f"{os.environ.get('MASTER_PORT', '0')}/{attempt()}"


def _peers(mesh: DeviceMesh, degrees: Degrees) -> dist.ProcessGroup | None:
    """The group of the ranks that have this one's data_rank; all ranks must call it."""
    if degrees.pp == 1:
        return mesh["tp"].get_group() if degrees.tp > 1 else None
    if degrees.data == 1:
        return dist.group.WORLD
    own = None
    for data_rank in range(degrees.data):
        ranks = mesh.mesh.flatten(1, 2)[:, data_rank].flatten().tolist()
        group = dist.new_group(ranks, timeout=TIMEOUT, group_desc="peers")
        if dist.get_rank() in ranks:
            own = group
    return own


def stand(parallel: ParallelConfig, device_type: str, local_rank: int) -> Ranks:
    """Where this process stands in the process group that it has joined; all ranks must call it."""
    size = dist.get_world_size()
    degrees = resolve_degrees(parallel, size)
    mesh = init_device_mesh(device_type, degrees, mesh_dim_names=AXES)
    stage, replica, shard, tp = mesh.get_coordinate() or (0, 0, 0, 0)
    return Ranks(
        rank=dist.get_rank(),
        size=size,
        local_rank=local_rank,
        degrees=degrees,
        data_rank=replica * degrees.dp_shard + shard,
        data_ranks=degrees.data,
        tp_rank=tp,
        pp_rank=stage,
        mesh=mesh,
        peers=_peers(mesh, degrees),
    )


@contextmanager
def open_ranks(parallel: ParallelConfig, platform: Platform) -> Iterator[Ranks]:
    """Join the run that the launcher's environment describes, and leave it at the end.

    Raises:
        BadRequest: the environment says how many ranks there are and not which this is.
    """
    size = world_size()
    if size == 1:
        yield Ranks()
        return
    if not {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise BadRequest(f"WORLD_SIZE={size} is set without RANK and the rest: unset it or start with torchrun")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if dist.is_initialized():  # an earlier run in this process failed
        dist.destroy_process_group()
    store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    # One launch may train several times (--multirun), and start again: each time ranks meet under other keys.
    times = store.add(f"trainwright/{attempt()}/opened/{rank}", 1)
    own_keys = dist.PrefixStore(f"trainwright/{attempt()}/{times}", store)  # type: ignore[attr-defined]
    drawn = own_keys.compare_set("round", "", secrets.token_hex(8)).decode()
    dist.init_process_group(platform.backend, timeout=TIMEOUT, store=own_keys, rank=rank, world_size=size)
    global _round
    _round = drawn  # not before all have it
    yield stand(parallel, platform.device.type, local_rank)
    # Not after an error: leaving waits for peers, and this rank has to say first what is wrong.
    dist.destroy_process_group()
