"""Counting what a process sends to others while it runs, collective by collective."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainwright.configs.degrees import Degrees
from trainwright.trainers.parallel.traffic import world_axis

# From operator to kind: an exchange of parts is how some platforms carry a reduce-scatter out.
KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "c10d::alltoall_base_": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "_c10d_functional::all_reduce": "all_reduce",
    "c10d::broadcast_": "broadcast",
    "c10d::send": "send",
}
PASSED_OVER = ("_c10d_functional::wait_tensor", "c10d::recv_")  # the other ends of what is counted
VOTE = 4  # bytes of a message by which a pipeline's stages find out once whether they know their shapes

Counts = dict[tuple[str, str], tuple[int, int]]  # calls and bytes by axis and kind


class CountCollectives(TorchDispatchMode):
    """Counts collectives by axis and kind while it is entered; what KINDS lacks has its own name for a kind."""

    def __init__(self, degrees: Degrees) -> None:
        super().__init__()
        self.world = world_axis(degrees)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.sent: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in PASSED_OVER:
            parts = [*args, *(kwargs or {}).values()]
            key = self._axis(name, parts), KINDS.get(name, name)
            sent = max(map(_bytes, (*parts, result)))
            if key[1] != "send" or sent > VOTE:
                self.calls[key] += 1
                self.sent[key] += sent
        return result

    def _axis(self, name: str, parts: list[Any]) -> str:
        """A mesh names the groups of its axes; the one that spans all ranks has the world's."""
        if name.startswith("c10d::"):
            boxed = next(part for part in parts if isinstance(part, torch.ScriptObject))
            group = dist.ProcessGroup.unbox(boxed)
        else:
            group = _resolve_process_group(parts[-1])
        described = group.group_desc
        return (
            self.world
            if described.endswith(("default_pg", "mesh_default"))
            else described.removeprefix("mesh_")
        )

    def counts(self) -> Counts:
        """What was counted so far."""
        return {key: (self.calls[key], self.sent[key]) for key in sorted(self.calls)}


def _bytes(part: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor))
