"""FSDP's all-gather and reduce-scatter as plain sends from rank to rank, for backends where that is faster.

gloo's reduce-scatter is an all-reduce, twice the bytes, and its all-gather passes parts round in a ring.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def send_directly(model: nn.Module) -> None:
    """Let all FSDP modules of `model` communicate this way."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_Gather())  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(_SumScatter())  # type: ignore[arg-type]


def _send(to: Sequence[Tensor], into: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Send `to[i]` to rank i and take `into[i]` from it, for every rank of `group` but this one."""
    own, waits = group.rank(), []
    for step in range(1, group.size()):  # each begins with its neighbour, so that all links are busy
        peer, source = (own + step) % group.size(), (own - step) % group.size()
        waits.append(dist.isend(to[peer], group=group, group_dst=peer))
        waits.append(dist.irecv(into[source], group=group, group_src=source))
    for work in waits:
        assert work is not None
        work.wait()


class _Allocating:
    """What FSDP asks of either for memory."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Allocating):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        parts = output_tensor.view(group.size(), -1)
        own = parts[group.rank()]
        if own.untyped_storage()._cdata != input_tensor.untyped_storage()._cdata:
            own.copy_(input_tensor.view(-1))
        _send([own] * group.size(), parts.unbind(), group)


class _SumScatter(_Allocating):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        parts = input_tensor.view(group.size(), -1)
        received = list(torch.empty_like(parts).unbind())
        _send(parts.unbind(), received, group)
        received[group.rank()] = parts[group.rank()]
        # In the order of the ranks, so that the sum doesn't depend on where it is made.
        first, *others = received
        total = output_tensor.view(-1)
        torch.add(first, others.pop(0) if others else 0, out=total)
        for part in others:
            total += part
