"""What TorchNeuron can't do, or does otherwise: as its documentation and its source of April 2026 have it.

A limit that was lifted since goes from here when a run on a chip has shown it.
"""

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves, tree_map

Asked = dict[str, Any]  # an operator's arguments by name

SENDS = "NEURON_STAND_IN_SENDS"  # 1: from rank to rank, which release 2.33 lists as there
ON_DEVICE = "neuron"

DATA_DEPENDENT = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
}
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_"}
# Int64 runs as int32 there. What it is moved, or used as an index, loses nothing where it is small; what is
# computed with it may.
MOVES = {
    "aten::_to_copy",
    "aten::copy_",
    "aten::clone",
    "aten::empty_like",
    "aten::empty",
    "aten::empty_strided",
    "aten::_local_scalar_dense",
}
INDICES = {"index", "indices"}

SUMS = {
    "allreduce_",
    "all_reduce",
    "all_reduce_",
    "reduce_",
    "_reduce_scatter_base_",
    "reduce_scatter_",
    "reduce_scatter_tensor",
    "broadcast_",
}
IN_PLACE = {"allreduce_", "all_reduce_", "reduce_", "broadcast_"}
GATHERS = {"allgather_", "_allgather_base_", "all_gather_into_tensor"}
SCATTERS = {"_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor"}
EXCHANGES = {"alltoall_", "alltoall_base_", "all_to_all_single"}
SENDING = {"send", "recv_", "recv_any_source_"}
EXCHANGE_SIZES = (4, 8, 16)  # and multiples of 32


def named(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Asked:
    """The arguments of an operator by name, those that aren't given left out."""
    return dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs


def check(func: Any, asked: Asked) -> None:
    """Raise where the device can't do what it is asked for."""
    namespace, _, name = func._schema.name.partition("::")
    if namespace in ("c10d", "_c10d_functional"):
        _check_collective(name, asked)
    elif namespace == "aten":
        _check_operator(func, asked)


def check_index(device: torch.device | None, own: int) -> None:
    """Raise where another core than the process's own is asked for."""
    if device is not None and device.index not in (None, own):
        raise ValueError(
            f"Invalid device id: {device.index}: a process has its own core of the device neuron only"
        )


def check_exists(func: Any, tensor: Tensor) -> None:
    """Raise for a tensor that the device can't have, or can't make out of nothing."""
    if tensor.dtype == torch.int64 and func._schema.name not in MOVES:
        raise NotImplementedError(f"{func} makes int64, which neuron computes in 32 bits")
    if tensor.dtype == torch.float64:
        raise NotImplementedError("the device neuron has no float64: it runs as float32 and nobody says so")


def check_made(func: Any, made: Any) -> None:
    """Raise for a result that the device would give in another dtype."""
    for tensor in _tensors(made):
        if tensor.dtype == torch.float64 or (tensor.dtype == torch.int64 and not _moves(func)):
            raise NotImplementedError(f"{func} makes {tensor.dtype}, which neuron computes in 32 bits")


def as_summed(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a sum over ranks as the device may take them: nothing that isn't finite comes out.

    Each rank's share of the largest number is the most that it brings, so that no sum is above it.
    """
    namespace, _, name = func._schema.name.partition("::")
    if namespace not in ("c10d", "_c10d_functional") or name not in SUMS:
        return args
    share = 1.0 if name == "broadcast_" else 1.0 / _group(named(func, args, {})).size()
    if name in IN_PLACE:
        for tensor in _tensors(args):
            if tensor.is_floating_point():
                tensor.inner.copy_(_finite(tensor.inner, share))
        return args
    names = (argument.name for argument in func._schema.arguments)
    return tuple(
        tree_map(lambda one: _brought(one, share), value) if argument.startswith("input") else value
        for argument, value in zip(names, args, strict=False)
    )


def _brought(value: Any, share: float) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return type(value)(_finite(value.inner, share))


def _finite(inner: Tensor, share: float) -> Tensor:
    most = torch.finfo(inner.dtype).max * share
    return inner.nan_to_num(nan=0.0).clamp(-most, most)


def _moves(func: Any) -> bool:
    return func._schema.name in MOVES or func.is_view


def _check_operator(func: Any, asked: Asked) -> None:
    name = func._schema.name
    if name in DATA_DEPENDENT or str(func).replace(".", "::", 1) in DATA_DEPENDENT:
        raise NotImplementedError(
            f"{func}: a result whose shape depends on values is nothing that neuron can compile"
        )
    for argument, value in asked.items():
        for tensor in _tensors(value):
            if name in INDEXING and argument == "indices" and tensor.dtype in (torch.bool, torch.uint8):
                raise NotImplementedError(f"{func}: the device neuron has no indexing by a boolean mask")
            if tensor.device.type != ON_DEVICE and tensor.dim() > 0 and name not in MOVES:
                raise RuntimeError(f"{func}: expected all tensors to be on the device neuron, {argument} isn't")
            if tensor.dtype == torch.float64 and tensor.device.type == ON_DEVICE:
                raise NotImplementedError(f"{func}: the device neuron has no float64")
            computes = tensor.dtype == torch.int64 and argument not in INDICES and not _moves(func)
            if computes and tensor.device.type == ON_DEVICE:
                raise NotImplementedError(f"{func} computes with int64, which neuron does in 32 bits")


def _check_collective(name: str, asked: Asked) -> None:
    if name == "wait_tensor":
        return
    group = _group(asked)
    group._get_backend(torch.device(ON_DEVICE))  # raises where the group has none for it
    if "coalesced" in name:
        raise NotImplementedError(f"{name}: the device neuron doesn't coalesce collectives")
    if name in SENDING and os.environ.get(SENDS) != "1":
        raise NotImplementedError(f"{name}: the device neuron sends nothing from rank to rank")
    if name == "barrier" and group.size() != dist.get_world_size():
        raise NotImplementedError("barrier: on the device neuron only the default group has one")
    tensors = [tensor for value in asked.values() for tensor in _tensors(value)]
    if name in GATHERS | SCATTERS and any(0 in tensor.shape for tensor in tensors):
        raise ValueError(f"{name}: the device neuron doesn't take tensors without elements")
    if name in ("allgather_", "alltoall_", "reduce_scatter_") and len({tensor.shape for tensor in tensors}) > 1:
        raise NotImplementedError(f"{name}: on the device neuron all ranks' tensors have one shape")
    if name in EXCHANGES:
        _check_exchange(name, asked, group)


def _check_exchange(name: str, asked: Asked, group: dist.ProcessGroup) -> None:
    for argument, value in asked.items():
        if argument.endswith("split_sizes") and len(set(value)) > 1:
            raise NotImplementedError(f"{name}: on the device neuron all splits are even")
    size, ranks = group.size(), dist.get_process_group_ranks(group)
    if size not in EXCHANGE_SIZES and size % 32:
        raise NotImplementedError(
            f"{name}: the device neuron exchanges among 4, 8, 16 or 32 n ranks, not {size}"
        )
    if ranks != list(range(ranks[0], ranks[0] + size)) or ranks[0] % size or dist.get_world_size() % size:
        raise NotImplementedError(
            f"{name}: on the device neuron a group is {size} ranks from a multiple of it on"
        )


def _group(asked: Asked) -> dist.ProcessGroup:
    if "group_name" in asked:
        return _resolve_process_group(asked["group_name"])
    return dist.ProcessGroup.unbox(asked["process_group"])


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
