"""Tensors of the device: each wraps one of the CPU, which does the work. And how they come to be."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from torch_neuronx import counting, limits
from torch_neuronx.device import INDEX, require_group

DEVICE, HOST = torch.device("neuron", INDEX), torch.device("cpu")
COPY = torch.ops.aten.copy_.default


class NeuronTensor(Tensor):
    """inner: the tensor of the CPU, of the same shape, strides and dtype."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "NeuronTensor":
        made: NeuronTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"NeuronTensor({self.inner!r})"

    @property
    def data(self) -> Tensor:
        """As torch has it; what is set, as when a module changes its dtype, is set inside too."""
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: "NeuronTensor") -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        """Python numbers; torch's own refuses subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(not issubclass(kind, NeuronTensor) for kind in types):
            return NotImplemented  # a DTensor's turn comes first
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do on the CPU what an operator is asked to do on the device, if the device could."""
    require_group()
    asked = limits.named(func, args, kwargs)
    limits.check(func, asked)
    counting.note(func, asked)
    given: dict[int, NeuronTensor] = {id(t.inner): t for t in tree_leaves(asked) if isinstance(t, NeuronTensor)}
    prepared = limits.as_summed(func, args)
    done = func(*tree_map(_on_host, prepared), **tree_map(_on_host, kwargs))
    if func is COPY and not isinstance(args[0], NeuronTensor):
        return args[0]  # from the device
    asked_for = kwargs.get("device")
    if asked_for is not None and torch.device(asked_for).type != DEVICE.type:
        return done
    made = tree_map(lambda one: _on_device(one, given), done)
    for one in given.values():
        assert one.shape == one.inner.shape, f"{func} changed the shape of a tensor in place"
    limits.check_made(func, made)
    return made


def _on_host(argument: Any) -> Any:
    if isinstance(argument, NeuronTensor):
        return argument.inner
    return HOST if isinstance(argument, torch.device) and argument.type == DEVICE.type else argument


def _on_device(result: Any, given: dict[int, NeuronTensor]) -> Any:
    """What an operator gives back: an argument that it worked on in place, or a new tensor."""
    if not isinstance(result, Tensor):
        return result
    return given[id(result)] if id(result) in given else NeuronTensor(result)


def _making(make: Any) -> Callable[..., Tensor]:
    """`make`, which makes a tensor out of nothing, for the device."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        require_group()
        device = kwargs.get("device")
        limits.check_index(device, INDEX)
        tensor = NeuronTensor(make(*args, **{**kwargs, "device": HOST, "pin_memory": False}))
        limits.check_exists(make, tensor)
        counting.note(make, limits.named(make, args, kwargs))
        return tensor

    return made


_library = torch.library.Library("aten", "IMPL")
_library.impl("empty.memory_format", _making(torch.ops.aten.empty.memory_format), "PrivateUse1")
_library.impl("empty_strided", _making(torch.ops.aten.empty_strided.default), "PrivateUse1")
# By itself it would give memory of no size to a function that makes it larger.
for _name in ("default", "start", "start_step"):
    _overload = getattr(torch.ops.aten.arange, _name)
    _library.impl(_overload.name().removeprefix("aten::"), _making(_overload), "PrivateUse1")


def _copy(to: NeuronTensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_` where torch makes a tensor of Python's numbers, which goes round `__torch_dispatch__`."""
    to.inner.copy_(_on_host(source))
    return to


_library.impl("copy_", _copy, "PrivateUse1")
