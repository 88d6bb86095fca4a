"""What FSDP asks for beside operators.

A tensor's storage, to free and to compare it, is that of the tensor inside; the accelerator's stream is ours.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

from torch_neuronx.device import current_stream
from torch_neuronx.tensor import NeuronTensor

torch.accelerator.current_stream = current_stream


def _inside(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, NeuronTensor) else tensor


def _on_inside(function: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    return lambda tensor: function(_inside(tensor))


for _module in (_fsdp_param, _fsdp_param_group):
    for _name in ("alloc_storage", "free_storage"):
        if hasattr(_module, _name):
            setattr(_module, _name, _on_inside(getattr(_module, _name)))

_reset = _fsdp_param.FSDPParam.reset_sharded_param


def _reset_unless_same(self: Any) -> None:
    """As FSDP does with tensors that aren't of a subclass: once filled up to equal shards, they stay."""
    parameter = getattr(self._module_info.module, self._module_info.param_name)
    parts = parameter._local_tensor, getattr(self, "_sharded_param_data", None)
    if parameter is self.sharded_param and all(isinstance(part, NeuronTensor) for part in parts):
        here, before = (part.inner.untyped_storage().data_ptr() for part in parts)
        if here == before:
            return
    _reset(self)


_fsdp_param.FSDPParam.reset_sharded_param = _reset_unless_same
