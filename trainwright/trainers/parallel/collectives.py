"""Conjugate collectives: differentiable communication whose backward is the opposite one.

Where activations are cut by position (sequence parallelism, arXiv 2205.05198) a layer gathers them and its
results are summed and scattered; where they are whole (Megatron-LM, arXiv 1909.08053) entering is free forward
and a sum backward, and leaving the other way round. Shapes: B batch, T length, D any.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVES = torch.ops._c10d_functional  # these torch.compile sees through; functions around them change
SumScatter = Callable[[Tensor, dist.ProcessGroup], Tensor]


class Peers(NamedTuple):
    """Tensor-parallel peers.

    rank, size: this one's place among them. sum_scatter: from (size, ...) to the sum over the peers of their
    entry `rank`, (...), by the means that suits the device.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    sum_scatter: SumScatter


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`Peers.sum_scatter` by the collective of that name."""
    size = group.size()
    return _done(COLLECTIVES.reduce_scatter_tensor(parts, "sum", size, group.group_name)).squeeze(0)


def exchange_and_add(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`Peers.sum_scatter` by an all-to-all, for backends without a reduce-scatter of their own."""
    splits = [1] * group.size()
    return _done(COLLECTIVES.all_to_all_single(parts, splits, splits, group.group_name)).sum(0)


def _done(begun: Tensor) -> Tensor:
    result: Tensor = COLLECTIVES.wait_tensor(begun)
    return result


def _gather(x: Tensor, peers: Peers) -> Tensor:
    begun = COLLECTIVES.all_gather_into_tensor(x.contiguous(), peers.size, peers.group.group_name)
    return _done(begun).view(peers.size, *x.shape).transpose(0, 1).flatten(1, 2)


def _scatter(x: Tensor, peers: Peers) -> Tensor:
    return peers.sum_scatter(x.unflatten(1, (peers.size, -1)).transpose(0, 1).contiguous(), peers.group)


def _sum(x: Tensor, peers: Peers) -> Tensor:
    return _done(COLLECTIVES.all_reduce(x.contiguous(), "sum", peers.group.group_name))


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return _gather(x, peers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _scatter(grads[0], ctx.peers), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return _scatter(x, peers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.peers), None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.peers), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return _sum(x, peers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def gather_sequence(x: Tensor, peers: Peers) -> Tensor:
    """Every peer's positions: (B, T / size, D) to (B, T, D). Backward: the peers' gradients, summed and cut."""
    out: Tensor = _GatherSequence.apply(x, peers)  # type: ignore[no-untyped-call]
    return out


def scatter_sum(x: Tensor, peers: Peers) -> Tensor:
    """The sum over the peers, of which each keeps its positions: (B, T, D) to (B, T / size, D)."""
    out: Tensor = _ScatterSum.apply(x, peers)  # type: ignore[no-untyped-call]
    return out


def enter(x: Tensor, peers: Peers) -> Tensor:
    """`x`, which is the same on every peer, going where each does a part: backward, the gradients' sum."""
    out: Tensor = _Enter.apply(x, peers)  # type: ignore[no-untyped-call]
    return out


def sum_over(x: Tensor, peers: Peers) -> Tensor:
    """The sum over the peers, the same on each."""
    out: Tensor = _Sum.apply(x, peers)  # type: ignore[no-untyped-call]
    return out
