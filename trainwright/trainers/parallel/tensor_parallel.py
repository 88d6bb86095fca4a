"""Carrying out a plan on tensor-parallel peers: weights are stored as DTensors, and computed with as shards."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from trainwright.models.cross_entropy import VocabularyShard
from trainwright.models.llama import Head
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
        the parameters whose gradient is each peer's part only, which a step has to sum once: where
        activations are cut by position, those of the layers that work on such a cut.
    """
    peers = Peers(mesh.get_group(), mesh.get_local_rank(), mesh.size(), sum_scatter)
    stored: dict[int, nn.Parameter] = {}  # by the plain parameter: a tied one is cut once
    partial = set()
    for name, style in styles.items():
        module = model.get_submodule(name)
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in stored:
                cut = distribute_tensor(parameter, mesh, [PLACEMENT[style]], src_data_rank=None)
                stored[id(parameter)] = nn.Parameter(cut)
            module.register_parameter(key, stored[id(parameter)])
            if style == "sequence" and sp:
                partial.add(f"{name}.{key}")
        # `forward` is replaced on the object: hooks of FSDP and others still go around all of it.
        module.forward = FORWARDS[style](module, module.forward, peers, sp)
    return frozenset(partial)


Forward = Callable[..., Tensor]


@contextmanager
def _shards(module: nn.Module) -> Iterator[None]:
    """Let `module` compute with its own shard of each parameter."""
    stored = dict(module._parameters)
    try:
        for key, parameter in stored.items():
            if isinstance(parameter, DTensor):
                module._parameters[key] = parameter.to_local()  # type: ignore[assignment]
        yield
    finally:
        module._parameters.update(stored)


def _column(module: nn.Module, forward: Forward, peers: Peers, sp: bool) -> Forward:
    """Each peer makes some of the outputs."""
    begin = gather_sequence if sp else enter

    def parallel(x: Tensor) -> Tensor:
        with _shards(module):
            return forward(begin(x, peers))

    return parallel


def _row(module: nn.Module, forward: Forward, peers: Peers, sp: bool) -> Forward:
    """Each peer multiplies some of the inputs; the results are summed."""
    end = scatter_sum if sp else sum_over

    def parallel(x: Tensor) -> Tensor:
        with _shards(module):
            return end(forward(x), peers)

    return parallel


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
        return _head(module, forward, peers, sp)
    end = scatter_sum if sp else sum_over

    def parallel(words: Tensor) -> Tensor:
        here = (words >= first) & (words < first + own)
        with _shards(module):
            rows = forward((words - first) * here)
        return end(rows * here.unsqueeze(-1), peers)

    return parallel


def _head(module: nn.Module, forward: Forward, peers: Peers, sp: bool) -> Forward:
    begin = gather_sequence if sp else enter

    def parallel(x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            raise ValueError("a head that is cut over ranks makes losses only: give targets")
        with _shards(module):
            return forward(begin(x, peers), targets)

    return parallel


def _whole(module: nn.Module, forward: Forward, peers: Peers, sp: bool) -> Forward:
    """Every peer has all of the weight, and computes with it what activations it has."""

    def parallel(*args: Any) -> Tensor:
        with _shards(module):
            return forward(*args)

    return parallel


FORWARDS: dict[Style, Callable[[nn.Module, Forward, Peers, bool], Forward]] = {
    "column": _column,
    "row": _row,
    "vocabulary": _vocabulary,
    "sequence": _whole,
    "replicate": _whole,
}
