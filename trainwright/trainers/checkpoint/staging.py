"""A copy of a state in memory of the host, kept from one save to the next."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainwright.trainers.parallel.shards import local
from trainwright.trainers.platform.base import Platform


class Staging:
    """Takes copies of states that have the same tensors each time; the memory is made once."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self._kept: dict[tuple[str, ...], Tensor] = {}

    @torch.no_grad()
    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """`state`, nested by names, with this rank's parts as they are now; the next copy overwrites them."""
        copied = self._copy(state, ())
        self.platform.synchronize()
        return copied

    def _copy(self, node: Mapping[str, Any], prefix: tuple[str, ...]) -> dict[str, Any]:
        return {
            name: self._copy(value, (*prefix, name))
            if isinstance(value, Mapping)
            else self._keep((*prefix, name), value)
            for name, value in node.items()
        }

    def _keep(self, name: tuple[str, ...], tensor: Tensor) -> Tensor:
        part = local(tensor)
        if name not in self._kept:
            self._kept[name] = torch.empty_like(part, device="cpu", pin_memory=self.platform.pins_memory)
        kept = self._kept[name].copy_(part, non_blocking=True)
        if isinstance(tensor, DTensor):
            # Not `from_local`, which would take the copy back to the mesh's device.
            return DTensor(kept, tensor._spec, requires_grad=False)
        return kept
