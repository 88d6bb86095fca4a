"""From a model on the meta device to this rank's part of it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.configs.schema import ParallelConfig
from trainwright.models.plan import Plan, Units
from trainwright.trainers.parallel.collectives import exchange_and_add, reduce_scatter
from trainwright.trainers.parallel.data_parallel import apply_data_parallel, before_backward
from trainwright.trainers.parallel.direct import send_directly
from trainwright.trainers.parallel.plan import styles_of, units_of
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.parallel.shards import materialise
from trainwright.trainers.parallel.tensor_parallel import apply_tensor_parallel
from trainwright.trainers.platform.base import Platform


@dataclass(frozen=True)
class Layout:
    """How a model lies on the ranks, for the stepper.

    partial: the parameters whose gradient tensor-parallel peers have in parts.
    keeps_masters: FSDP keeps the weights in fp32 and makes those that the model computes with.
    """

    ranks: Ranks
    zero: int
    partial: frozenset[str] = frozenset()
    keeps_masters: bool = False

    def before_backward(self, model: nn.Module, last: bool) -> None:
        """Say whether the next micro-batch is the step's last: only then all of the communication is due."""
        before_backward(model, self.zero, last)

    def sum_partial(self, gradients: dict[str, Tensor]) -> None:
        """Sum the gradients that tensor-parallel peers have in parts, in place and in one message."""
        parts = [gradients[name] for name in sorted(self.partial)]
        if not parts:
            return
        assert self.ranks.mesh is not None
        together = torch.cat([part.flatten() for part in parts])
        if not together.numel():  # of a shard that is empty, on all peers alike
            return
        dist.all_reduce(together, group=self.ranks.mesh["tp"].get_group())
        for part, total in zip(parts, together.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))


def parallelize(
    model: nn.Module,
    plan: Plan,
    units: Units,
    ranks: Ranks,
    parallel: ParallelConfig,
    computes_in: torch.dtype,
    platform: Platform,
) -> Layout:
    """Cut `model`, which is on the meta device, as `plan` says, and make this rank's part of it real.

    Its weights hold nothing yet: `shards.local_pieces` are to be filled.

    Raises:
        ValueError: the plan or the units don't fit the model.
    """
    styles, modules = styles_of(model, plan), units_of(model, units)
    sum_scatter = exchange_and_add if platform.sends_directly else reduce_scatter
    partial: frozenset[str] = frozenset()
    if ranks.degrees.tp > 1:
        assert ranks.mesh is not None
        sp = parallel.sp is not False
        partial = apply_tensor_parallel(model, styles, ranks.mesh["tp"], sp, sum_scatter)
    sharded = ranks.degrees.data > 1
    if sharded:
        apply_data_parallel(model, modules, ranks, parallel.zero, computes_in)
        if platform.sends_directly:
            send_directly(model)
    materialise(model, platform.device)
    return Layout(ranks, parallel.zero, partial, keeps_masters=sharded)
