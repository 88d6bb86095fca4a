"""From a model to this rank's part of it, both on the meta device."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainwright.configs.schema import ParallelConfig
from trainwright.models.plan import Plan, Units
from trainwright.trainers.parallel.collectives import exchange_and_add, reduce_scatter
from trainwright.trainers.parallel.data_parallel import (
    after_deferred,
    apply_data_parallel,
    before_backward,
    prefetch_in_order,
)
from trainwright.trainers.parallel.direct import send_directly
from trainwright.trainers.parallel.plan import styles_of, units_of
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.parallel.stages import Stages, parts_of
from trainwright.trainers.parallel.tensor_parallel import apply_tensor_parallel
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.platform.cpu import Cpu


@dataclass(frozen=True)
class Layout:
    """How a model lies on the ranks, for the stepper.

    partial: the parameters whose gradient tensor-parallel peers have in parts.
    keeps_masters: FSDP keeps the weights in fp32 and makes those that the model computes with.
    reduces_in: the dtype in which gradients are summed over ranks.
    platform: whose device it is on.
    """

    ranks: Ranks
    zero: int
    partial: frozenset[str] = frozenset()
    keeps_masters: bool = False
    reduces_in: torch.dtype = torch.float32
    platform: Platform = field(default_factory=Cpu)

    def before_backward(self, model: nn.Module, last: bool) -> None:
        """Say whether the next micro-batch is the step's last: only then all of the communication is due."""
        before_backward(model, self.zero, last)

    def after_deferred(self, model: nn.Module, last: bool) -> None:
        """Take over the weights' gradients that a micro-batch's backward had put off; `last` as above."""
        after_deferred(model, self.zero, last)

    def sum_partial(self, gradients: dict[str, Tensor]) -> None:
        """Sum the gradients that tensor-parallel peers have in parts, in place and in one message."""
        parts = [gradients[name] for name in sorted(self.partial)]
        if not parts:
            return
        assert self.ranks.mesh is not None
        together = torch.cat([part.flatten().to(self.reduces_in) for part in parts])
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
    reduces_in: torch.dtype = torch.float32,
) -> Layout:
    """Cut `model`, which is on the meta device and stays there, to this rank's part of it, as `plan` says.

    `shards.materialise` then gives it memory. Each of a rank's `Stages` is cut by itself.

    Raises:
        ValueError: the plan or the units don't fit the model.
    """
    sum_scatter = exchange_and_add if platform.sends_directly else reduce_scatter
    partial: frozenset[str] = frozenset()
    sharded, staged = ranks.degrees.data > 1, isinstance(model, Stages)
    for part in parts_of(model):
        styles, modules = styles_of(part, plan, part=staged), units_of(part, units, part=staged)
        if ranks.degrees.tp > 1:
            assert ranks.mesh is not None
            sp = parallel.sp is not False
            partial |= apply_tensor_parallel(part, styles, ranks.mesh["tp"], sp, sum_scatter)
        if sharded:
            apply_data_parallel(part, modules, ranks, parallel.zero, computes_in, reduces_in)
            if staged:
                prefetch_in_order(modules)
    if sharded and platform.sends_directly:
        send_directly(model)
    return Layout(ranks, parallel.zero, partial, sharded, reduces_in, platform)
