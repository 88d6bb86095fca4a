"""ZeRO and hybrid sharding over the data-parallel ranks, by FSDP2's own switches (arXiv 1910.02054)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from trainwright.models.llama import Head
from trainwright.trainers.parallel.ranks import Ranks


def apply_data_parallel(
    model: nn.Module,
    units: Sequence[Sequence[nn.Module]],
    ranks: Ranks,
    zero: int,
    computes_in: torch.dtype,
    reduces_in: torch.dtype,
) -> None:
    """Shard `model` over dp_shard and replicate it over dp_replicate, in place.

    units: modules whose parameters travel together. That with the head makes the loss together with its
    gradients, and an embedding is read by index, so neither is needed in the backward pass.
    computes_in: where it isn't the dtype of the parameters, they are rounded to it as they are gathered.
    reduces_in: the dtype in which gradients are summed over ranks.
    """
    assert ranks.mesh is not None
    # zero=0 has all ranks on dp_replicate: a shard is the whole there and nothing but gradients travels.
    hybrid = ranks.degrees.dp_replicate > 1
    mesh = ranks.mesh["dp_replicate", "dp_shard"] if hybrid else ranks.mesh["dp_shard"]
    lower = None if computes_in == torch.float32 else computes_in
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=reduces_in)

    def cut(parameter: nn.Parameter) -> Shard | None:
        """Stacks of matrices that can't be dealt evenly are cut by rows, if these can."""
        stack, shards = parameter.dim() == 3, ranks.degrees.dp_shard
        return Shard(1) if stack and parameter.shape[0] % shards and not parameter.shape[1] % shards else None

    for unit in units:
        again = zero == 3 and not any(isinstance(module, Head) for module in unit)
        fully_shard(
            list(unit),  # type: ignore[arg-type]
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=again,
            shard_placement_fn=cut,
        )
        if len(unit) == 1 and isinstance(unit[0], nn.Embedding):
            cast(FSDPModule, unit[0]).set_unshard_in_backward(False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sums, never means: gradients are already parts of the global batch's mean.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def prefetch_in_order(units: Sequence[Sequence[nn.Module]]) -> None:
    """Let each unit's backward pass gather the weights of the unit before it ahead, and no others.

    FSDP itself goes by the order of all forward passes since the last backward pass. In a pipeline these are
    several micro-batches', and it would gather the last unit after the first, for nobody.
    """
    for before, unit in pairwise([units[0], *units]):
        cast(FSDPModule, unit[0]).set_modules_to_backward_prefetch([cast(FSDPModule, before[0])])


def after_deferred(model: nn.Module, zero: int, last: bool) -> None:
    """Hand over gradients that were made after a backward pass of FSDP's had ended; `last` as below.

    That pass's own end, called again, takes what it finds: no public call does.
    """
    if isinstance(model, FSDPModule):
        before_backward(model, zero, last)
        model._get_fsdp_state()._root_post_backward_final_callback()


def before_backward(model: nn.Module, zero: int, last: bool) -> None:
    """Say which communication the micro-batch that comes next needs; `last`: no more will follow in this step.

    zero 0 and 1: weights stay gathered and gradients are reduced with the last; 2 and 3: gradients are
    reduced to shards at once, and summed over replicas with the last.
    """
    if not isinstance(model, FSDPModule):
        return
    # Each backward is left FSDP's last one: else it prefetches by the order of earlier micro-batches too.
    if zero <= 1:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    else:
        model.set_requires_all_reduce(last)
