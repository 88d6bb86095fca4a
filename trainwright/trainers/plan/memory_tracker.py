"""Following the memory of every tensor that a process makes, by kind; it may have values or none.

What an operator uses inside itself isn't seen, nor what an allocator keeps or wastes.
"""

import sys
import weakref
from collections.abc import Iterable
from functools import cache, partial
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainwright.trainers.plan.memory import Memory

RECEIVED = "received"  # what a pipeline's stages send each other: room for all micro-batches of a step
KINDS = (*Memory._fields, RECEIVED)

# Whose memory it is, by the nearest caller that stands here: a part of its file's path, its name and the
# operator that it called; empty for any.
WHOLE = "whole"  # the gradient of a parameter that the model computes with: see `MemoryTracker`
HEAD = "trainwright/models/cross_entropy.py"
MAKERS = (
    ("torch/distributed/fsdp/_fully_shard/", "", "", "gathered"),
    ("trainwright/trainers/parallel/direct.py", "", "", "gathered"),
    ("torch/distributed/pipelining/", "_make_tensor_from_meta", "", RECEIVED),
    (HEAD, "_softmax", "", "logits"),
    (HEAD, "forward", "aten::mm", "logits"),
    (HEAD, "forward", "aten::_to_copy", "logits"),
    (HEAD, "_add_product", "", WHOLE),
    (HEAD, "backward", "", WHOLE),
    ("trainwright/trainers/precision.py", "", "", "gradients"),
    ("trainwright/trainers/steppers/updating.py", "", "", "gradients"),
    ("trainwright/trainers/parallel/apply.py", "sum_partial", "", "gradients"),
    ("trainwright/trainers/bf16_adamw.py", "", "", "optimizer"),
    ("trainwright/trainers/optim.py", "", "", "optimizer"),
    ("torch/optim/", "", "", "optimizer"),
)
OTHERS = "activations"

ENGINE = "_engine_run_backward"  # calls autograd, which calls operators itself
AROUND = ("torch/_dynamo/eval_frame.py", "torch/_compile.py")  # what torch puts around a mode
DETACH = torch.ops.aten.detach.default
REDUCE_SCATTER = torch.ops.c10d._reduce_scatter_base_.default

ByKind = dict[str, int]


class MemoryTracker(TorchDispatchMode):
    """Adds up the bytes of all tensors that are made while it is entered, until they are gone.

    It has to be the last of the modes that are entered, so that operators' callers are seen.

    whole_gradients: the kind of what autograd keeps for a parameter that the model computes with: `gathered`
    where FSDP reduces it to the rank's part.
    """

    def __init__(self, whole_gradients: str) -> None:
        super().__init__()
        self._whole_gradients = whole_gradients
        # By storage: its kind, its bytes, and a reference that tells when it is gone.
        self._live: dict[int, tuple[str, int, Any]] = {}
        self._now: ByKind = dict.fromkeys(KINDS, 0)
        self._total = self._most = 0
        self._peak = dict(self._now)

    def begin(self) -> None:
        """Forget the peak so far."""
        self._most, self._peak = self._total, dict(self._now)

    def peak(self) -> ByKind:
        """Bytes by kind when they were the most together, since `begin`."""
        return dict(self._peak)

    def now(self) -> ByKind:
        """Bytes by kind at present."""
        return dict(self._now)

    def assign(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """From now on the memory of `tensors` is of this kind."""
        for tensor in tensors:
            storage = _stored(tensor).untyped_storage()
            if storage._cdata in self._live:
                before, size, reference = self._live[storage._cdata]
                self._live[storage._cdata] = kind, size, reference
                self._change(before, -size)
                self._change(kind, size)
            else:
                self._enter(storage, kind)

    def take_gradient(self, parameter: Tensor) -> None:
        """A hook for each of the model's parameters: what it gets is the rank's own part of its gradient."""
        assert parameter.grad is not None
        self.assign("gradients", [parameter.grad])

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = [result] if isinstance(result, Tensor) else tree_leaves(result)
        for tensor in made:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = _stored(tensor).untyped_storage()
                if storage._cdata not in self._live:
                    kind = _kind_by_caller(function._schema.name)
                    self._enter(storage, self._whole_gradients if kind == WHOLE else kind)
        if function is REDUCE_SCATTER:  # what comes out is the rank's own part of the gradients
            self.assign("gradients", [args[0]])
        # So autograd keeps a gradient: of a parameter, or of the (B, T, D) that a stage has received. What was
        # saved it takes out likewise: weights, too.
        if function is DETACH and result.dim() < 3 and _called_by_engine() and self._kind_of(result) == OTHERS:
            self.assign(self._whole_gradients, [result])
        return result

    def __enter__(self) -> "MemoryTracker":
        # FSDP frees and fills the memory of gathered weights this way, which no operator tells of.
        self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            resized = self._resize(storage, size)
            if storage._cdata in self._live:
                kind, before, reference = self._live[storage._cdata]
                self._live[storage._cdata] = kind, size, reference
                self._change(kind, size - before)
            return resized

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign, assignment]

    def _kind_of(self, tensor: Tensor) -> str:
        return self._live[_stored(tensor).untyped_storage()._cdata][0]

    def _enter(self, storage: torch.UntypedStorage, kind: str) -> None:
        gone = weakref.ref(storage, partial(self._leave, storage._cdata))
        self._live[storage._cdata] = kind, storage.nbytes(), gone
        self._change(kind, storage.nbytes())

    def _leave(self, key: int, _: Any) -> None:
        kind, size, _ = self._live.pop(key)
        self._change(kind, -size)

    def _change(self, kind: str, size: int) -> None:
        self._now[kind] += size
        self._total += size
        if self._total > self._most:
            self._most, self._peak = self._total, dict(self._now)


def _stored(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _called_by_engine() -> bool:
    frame = sys._getframe(2)
    while frame.f_code.co_filename.endswith(AROUND) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == ENGINE


def _kind_by_caller(operator: str) -> str:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if kind := _kind_made_by(frame.f_code, operator):
            return kind
        frame = frame.f_back
    return OTHERS


@cache
def _kind_made_by(code: CodeType, operator: str) -> str | None:
    path, called = code.co_filename, (code.co_name, operator)
    for part, *names, kind in MAKERS:
        if part in path and all(name in ("", has) for name, has in zip(names, called, strict=True)):
            return kind
    return None
