"""A rank's own part of parameters that are stored as DTensors."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from trainwright.models.storage import Piece


def local(tensor: Tensor) -> Tensor:
    """The rank's part, sharing memory; a plain tensor is all here."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def stored_like(part: Tensor, parameter: Tensor) -> Tensor:
    """`part`, this rank's, as a tensor that is laid out as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def counts_here(parameter: Tensor) -> bool:
    """Whether this rank counts its part in a sum over all ranks: of ranks with the same part, one does."""
    if not isinstance(parameter, DTensor):
        return True
    coordinate = parameter.device_mesh.get_coordinate() or ()
    placed = zip(coordinate, parameter.placements, strict=True)
    return all(where == 0 for where, placement in placed if placement.is_replicate())


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device memory for this rank's part of it; tied parameters stay tied."""
    first: dict[int, tuple[nn.Module, str]] = {}
    tied = []
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in first:
                tied.append((module, key, first[id(parameter)]))
            else:
                first[id(parameter)] = module, key
    model.to_empty(device=device)
    for module, key, (source, source_key) in tied:
        module.register_parameter(key, getattr(source, source_key))


def local_pieces(model: nn.Module) -> dict[str, Piece]:
    """The rank's part of every parameter by name, and where in the whole it starts."""
    return {name: _piece(parameter) for name, parameter in model.named_parameters()}


def _piece(parameter: nn.Parameter) -> Piece:
    if not isinstance(parameter, DTensor):
        return Piece(parameter.detach())
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    start = _start(parameter.shape, mesh.shape, tuple(coordinate), parameter.placements)
    return Piece(local(parameter), *start[-2:], *start[:-2])  # a stack of matrices has its own dim first


@cache
def _start(
    shape: torch.Size, mesh: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> tuple[int, ...]:
    """Where in the whole a rank's part starts. Of many layers the same, and on many ranks slow to find out."""
    _, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
    return offset
