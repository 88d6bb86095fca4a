"""How tokens get to their experts' rows and back, in one process.

Both ways are gathers, forward and backward: no sums in an order that the device chooses. Shapes in comments:
N tokens, K experts a token, N K slots (token-major), M rows, D hidden size, E experts.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trainwright.models.moe_router import load_of


class Sent(NamedTuple):
    """Tokens in the order of their experts, and the way back.

    rows: (M, D). counts: (E,) int64, of each expert in turn how many rows; None: all have M / E.
    slots: (M,) int64, whose each row is. places: (N K,) int64, the row of each slot.
    kept: (N, K) bool; false: the slot was dropped and its place is somebody else's. None: all were kept.
    """

    rows: Tensor
    counts: Tensor | None
    slots: Tensor
    places: Tensor
    kept: Tensor | None = None

    def dropped(self) -> Tensor:
        """The share of slots that no expert has taken, a float32 scalar."""
        if self.kept is None:
            return self.rows.new_zeros((), dtype=torch.float32)
        return 1.0 - self.kept.float().mean()


class Dispatcher(Protocol):
    """The seam between a router, its experts and where these are."""

    def dispatch(self, x: Tensor, experts: Tensor, gates: Tensor) -> Sent:
        """Tokens x (N, D) on their way to `experts` (N, K), which count as `gates` (N, K) say."""

    def combine(self, made: Tensor, gates: Tensor, sent: Sent) -> Tensor:
        """What the experts made of `sent`, (M, D), added up for each token with its gates (N, K): (N, D)."""


class Dropless:
    """Every expert gets as many rows as tokens chose it."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def dispatch(self, x: Tensor, experts: Tensor, gates: Tensor) -> Sent:
        """See `Dispatcher`."""
        slots = experts.flatten().argsort(stable=True)
        places = torch.empty_like(slots).scatter_(0, slots, torch.arange(len(slots), device=x.device))
        counts = load_of(experts, self.experts)
        return Sent(_Spread.apply(x, slots, places, None), counts, slots, places)  # type: ignore[no-untyped-call]

    def combine(self, made: Tensor, gates: Tensor, sent: Sent) -> Tensor:
        """See `Dispatcher`."""
        combined: Tensor = _Combine.apply(made, gates, sent.slots, sent.places)  # type: ignore[no-untyped-call]
        return combined


class Capacity:
    """Every expert gets equally many rows: shapes depend on the number of tokens alone (GShard, 2006.16668).

    factor: the rows of an expert, in its share of an even load. Of more slots those with the smallest gates are
    dropped; of fewer, what is left over computes something that nobody reads.
    renormalise: the gates of a token's other slots are scaled to sum to 1, as all did.
    """

    def __init__(self, experts: int, factor: float, *, renormalise: bool) -> None:
        self.experts = experts
        self.factor = factor
        self.renormalise = renormalise

    def dispatch(self, x: Tensor, experts: Tensor, gates: Tensor) -> Sent:
        """See `Dispatcher`."""
        chosen = experts.flatten()
        room = capacity_of(len(chosen), self.experts, self.factor)
        by_gate = gates.detach().flatten().argsort(descending=True, stable=True)
        order = by_gate[chosen[by_gate].argsort(stable=True)]  # by expert, and the largest gates first
        counts = load_of(experts, self.experts)
        begins = counts.cumsum(0) - counts
        ranks = torch.arange(len(chosen), device=x.device) - begins[chosen[order]]
        here = ranks < room
        rows = self.experts * room
        found = torch.where(here, chosen[order] * room + ranks, rows)  # one row more takes what is dropped
        slots = torch.zeros(rows + 1, dtype=torch.int64, device=x.device).scatter_(0, found, order)[:rows]
        places = torch.empty_like(chosen).scatter_(0, order, found.clamp(max=rows - 1))
        kept = torch.empty_like(here).scatter_(0, order, here).view(experts.shape)
        spread = _Spread.apply(x, slots, places, kept)  # type: ignore[no-untyped-call]
        return Sent(spread, None, slots, places, kept)

    def combine(self, made: Tensor, gates: Tensor, sent: Sent) -> Tensor:
        """See `Dispatcher`."""
        assert sent.kept is not None
        left = gates * sent.kept
        if self.renormalise:
            left = left / left.sum(-1, keepdim=True).clamp(min=1e-9)
        combined: Tensor = _Combine.apply(made, left, sent.slots, sent.places)  # type: ignore[no-untyped-call]
        return combined


def capacity_of(slots: int, experts: int, factor: float) -> int:
    """Rows of each expert."""
    return math.ceil(slots / experts * factor)


class _Spread(torch.autograd.Function):
    """x (N, D) to rows (M, D): each slot's token in the slot's place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, places: Tensor, kept: Tensor | None) -> Tensor:
        each = len(places) // len(x)
        ctx.save_for_backward(places, kept)
        ctx.each = each
        return x.index_select(0, slots // each)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        places, kept = ctx.saved_tensors
        total: Tensor | None = None
        for number, column in enumerate(places.view(-1, ctx.each).unbind(1)):
            part = grads[0].index_select(0, column)
            if kept is not None:
                part = part * kept[:, number, None]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total, None, None, None


class _Combine(torch.autograd.Function):
    """Rows (M, D) and gates (N, K) to tokens (N, D), added up in fp32; a gate of 0 leaves its row out.

    A row that is nobody's has slot 0's gate and gradient, unless that is elsewhere: it mustn't learn.
    """

    @staticmethod
    def forward(ctx: Any, made: Tensor, gates: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(made, gates, slots, places)
        total: Tensor | None = None
        for column, gate in zip(places.view(gates.shape).unbind(1), gates.split(1, 1), strict=True):
            part = made.index_select(0, column) * gate
            total = part if total is None else total.add_(part)
        assert total is not None
        return total.to(made.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        made, gates, slots, places = ctx.saved_tensors
        own = places.index_select(0, slots) == torch.arange(len(slots), device=slots.device)
        gradient = grads[0].index_select(0, slots // gates.shape[1])
        grad_gates = (made * gradient).sum(-1, dtype=gates.dtype)[places].view(gates.shape)
        gate = (gates.flatten().index_select(0, slots) * own).unsqueeze(1)
        return (gradient * gate).to(made.dtype), grad_gates, None, None
