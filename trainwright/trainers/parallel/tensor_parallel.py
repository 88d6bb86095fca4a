"""Carrying out a plan on tensor-parallel peers: weights are stored as DTensors, and computed with as shards."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from trainwright.models.cross_entropy import VocabularyShard
from trainwright.models.llama import Attention, Head
from trainwright.models.plan import Style
from trainwright.trainers.parallel.collectives import (
    Peers,
    SumScatter,
    enter,
    gather_sequence,
    scatter_sum,
    sum_over,
)

PLACEMENT: dict[Style, Placement] = {
    "column": Shard(0),
    "kv_groups": Shard(0),
    "row": Shard(1),
    "vocabulary": Shard(0),
    "sequence": Replicate(),
    "replicate": Replicate(),
}


def apply_tensor_parallel(
    model: nn.Module, styles: Mapping[str, Style], mesh: DeviceMesh, sp: bool, sum_scatter: SumScatter
) -> frozenset[str]:
    """Cut `model` over the one axis of `mesh`, in place; the result is used as the model was.

    styles: of every module with weights, by name. sp: cut activations between the cut layers by position.

    Returns:
        the parameters whose gradient is each peer's part only, which a step has to sum once: of layers that
        work on a cut of the activations, and of projections that are whole because groups of heads are few.
    """
    peers = Peers(mesh.get_group(), mesh.get_local_rank(), mesh.size(), sum_scatter)
    stored: dict[int, nn.Parameter] = {}  # by the plain parameter: a tied one is cut once
    partial = set()
    sharing = set()
    for name, style in styles.items():
        module = model.get_submodule(name)
        attention = few_groups(model, name, style, peers.size)
        placement = placement_of(model, name, style, peers.size)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in stored:
                cut = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
                stored[id(parameter)] = nn.Parameter(cut)
            module.register_parameter(key, stored[id(parameter)])
            if (style == "sequence" and sp) or attention is not None:
                partial.add(f"{name}.{key}")
        rows = None
        if attention is not None:
            sharing.add(attention)
            rows = _rows_here(attention, peers).to(mesh.device_type)
        # `forward` is replaced on the object: hooks of FSDP and others still go around all of it.
        module.forward = FORWARDS[style](module, _on_shards(module, module.forward, rows), peers, sp)
    for attention in sharing:
        attention.per_group //= peers.size // attention.groups
    return frozenset(partial)


def few_groups(model: nn.Module, name: str, style: Style, ranks: int) -> Attention | None:
    """The attention of a projection by KV group, where it has fewer groups than there are ranks."""
    if style != "kv_groups":
        return None
    attention = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(attention, Attention)
    return attention if attention.groups < ranks else None


def placement_of(model: nn.Module, name: str, style: Style, ranks: int) -> Placement:
    """How the weight of the module `name` lies on so many tensor-parallel ranks."""
    return Replicate() if few_groups(model, name, style, ranks) else PLACEMENT[style]


def _rows_here(attention: Attention, peers: Peers) -> Tensor:
    """Of a projection that is whole on every peer, the rows that this one needs.

    Several peers share a group: each has some of its query heads, where they stand in the projection too, and
    the group's key or value.
    """
    groups, sharers = attention.groups, peers.size // attention.groups
    queries, last = (attention.per_group, 2) if attention.coalesce else (0, 1)
    rows = torch.arange(groups * (queries + last) * attention.head_dim).view(groups, queries + last, -1)
    group, part = divmod(peers.rank, sharers)
    own = queries // sharers
    return torch.cat((rows[group, part * own : (part + 1) * own], rows[group, queries:])).flatten()


Forward = Callable[..., Tensor]


def _on_shards(module: nn.Module, forward: Forward, rows: Tensor | None) -> Forward:
    """`forward` computing with this rank's shard of each parameter; `rows`: only these of it."""

    def with_shards(*args: Any) -> Tensor:
        stored = dict(module._parameters)
        try:
            for key, parameter in stored.items():
                if isinstance(parameter, DTensor):
                    shard = parameter.to_local()
                    own = shard if rows is None else shard[rows]
                    module._parameters[key] = own  # type: ignore[assignment]
            return forward(*args)
        finally:
            module._parameters.update(stored)

    return with_shards


# Each of these makes of a module's forward on this rank's shards the forward that stands for the whole.


def _column(module: nn.Module, forward: Forward, peers: Peers, sp: bool) -> Forward:
    """Each peer makes some of the outputs."""
    begin = gather_sequence if sp else enter
    return lambda x: forward(begin(x, peers))


def _row(module: nn.Module, forward: Forward, peers: Peers, sp: bool) -> Forward:
    """Each peer multiplies some of the inputs; the results are summed."""
    end = scatter_sum if sp else sum_over
    return lambda x: end(forward(x), peers)


def _vocabulary(module: nn.Module, forward: Forward, peers: Peers, sp: bool) -> Forward:
    """Each peer has the rows of some words."""
    table = module.weight
    assert isinstance(table, DTensor)
    own = table.to_local().shape[0]
    first = peers.rank * own
    if isinstance(module, Head):
        module.shard = VocabularyShard(
            first,
            sum=lambda t: dist.all_reduce(t, group=peers.group),
            max=lambda t: dist.all_reduce(t, dist.ReduceOp.MAX, group=peers.group),
        )
        return _head(forward, peers, sp)
    end = scatter_sum if sp else sum_over

    def look_up(words: Tensor) -> Tensor:
        here = (words >= first) & (words < first + own)
        return end(forward((words - first) * here) * here.unsqueeze(-1), peers)

    return look_up


def _head(forward: Forward, peers: Peers, sp: bool) -> Forward:
    begin = gather_sequence if sp else enter

    def losses(x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            raise ValueError("a head that is cut over ranks makes losses only: give targets")
        return forward(begin(x, peers), targets)

    return losses


def _whole(module: nn.Module, forward: Forward, peers: Peers, sp: bool) -> Forward:
    """Every peer has all of the weight, and computes with it what activations it has."""
    return forward


FORWARDS: dict[Style, Callable[[nn.Module, Forward, Peers, bool], Forward]] = {
    "column": _column,
    "kv_groups": _column,
    "row": _row,
    "vocabulary": _vocabulary,
    "sequence": _whole,
    "replicate": _whole,
}
