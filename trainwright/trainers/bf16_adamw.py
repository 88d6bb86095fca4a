"""AdamW over weights and moments in bfloat16, computed in float32 and rounded, a parameter in one pass."""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainwright.configs.schema import OptimConfig
from trainwright.models.storage import Piece
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.rounding import (
    as_matrix,
    bits_of,
    halves_of,
    round_stochastically,
    rounding_key,
)

Halves = tuple[Tensor, Tensor]  # see `rounding.halves_of`
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Halves | None, Tensor], None]

CHUNK = 1 << 18  # elements that are float32 at a time where nothing is compiled
COMPILED_FROM = 1 << 22  # elements of a rank: below, the compiler takes longer than it saves
MATRIX_FROM = 1 << 14  # elements of a parameter: below, a compiled call costs as much as it saves

# Inductor else stores what many operations have made or several read, as float32 of the whole parameter.
ONE_LOOP: dict[str, Any] = {
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
    "realize_acc_reads_threshold": 1 << 20,
}
if torch.backends.cpu.get_cpu_capability() == "AVX512":
    # A float is taken for an integer element by element, a loop that gcc unrolls for 16 but not for 32 of them.
    ONE_LOOP["cpp.simdlen"] = 256
OPTIONS = {"inductor": ONE_LOOP}  # by torch.compile's backend


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    halves: Halves | None,
    numbers: Tensor,
) -> None:
    """One update of a matrix in place (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2).

    weight, exp_avg, exp_avg_sq: (r, c) of one dtype. gradient: (r, c) of any. numbers: those of `numbers_of`.
    halves: of the random bits; None rounds to nearest.

    Of the 32 bits of an element the low half rounds the weight and the high half its second moment, which else
    couldn't decay where 1 - beta2 is below 2**-9. The first moment changes by more and is rounded to nearest.
    """
    scale, shrink, rise1, keep2, rise2, size, root, eps = numbers.unbind()
    grad = gradient.float() * scale
    first = exp_avg.float()
    first = first + (grad - first) * rise1
    second = exp_avg_sq.float() * keep2 + grad * grad * rise2
    before = weight.float()
    # Not weight * (1 - shrink): rounded to float32, that factor errs alike for all weights, by 19 % of 1.5e-7.
    updated = before - (before * shrink + first * size / (second.sqrt() * root + eps))
    exp_avg.copy_(first)
    if halves is None:
        exp_avg_sq.copy_(second)
        weight.copy_(updated)
    else:
        bits = bits_of(*halves)
        exp_avg_sq.copy_(round_stochastically(second, bits >> 16))
        weight.copy_(round_stochastically(updated, bits))


def numbers_of(
    step: int, lr: float, decay: float, optim: OptimConfig, scale: Tensor | None, platform: Platform
) -> Tensor:
    """What an update multiplies and adds, (8,) float32: see `adamw_`.

    decay: the weight decay. scale: what gradients are divided by.
    """
    numbers = [
        lr * decay,
        1 - optim.beta1,
        optim.beta2,
        1 - optim.beta2,
        lr / (1 - optim.beta1**step),
        (1 - optim.beta2**step) ** -0.5,
        optim.eps,
    ]
    times = torch.ones(1, device=platform.device) if scale is None else scale.reshape(1).reciprocal()
    return torch.cat((times, platform.numbers(numbers)))


def in_chunks(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    halves: Halves | None,
    numbers: Tensor,
) -> None:
    """`adamw_` with few rows at a time, which bounds its float32 memory."""
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        own = None if halves is None else (halves[0][rows], halves[1])
        adamw_(weight[rows], gradient[rows], exp_avg[rows], exp_avg_sq[rows], own, numbers)


@cache
def compiled(
    device: torch.device,
    gradients_in: torch.dtype,
    stochastic: bool,
    kept_in: torch.dtype = torch.bfloat16,
    backend: str = "inductor",
    any_shape: bool = True,
) -> Kernel | None:
    """`adamw_` as a single loop, by torch.compile; None where that doesn't work.

    What is asked for is compiled here and now: an update with it, of a matrix with several rows and columns,
    compiles nothing where the backend compiles for `any_shape` at once.

    kept_in: the dtype of weights and moments.
    """
    kernel: Kernel = torch.compile(adamw_, dynamic=any_shape, backend=backend, options=OPTIONS.get(backend))
    # Large and not square: what is compiled for it suits any size, on all threads.
    weight, first, second = (torch.zeros(1024, 768, dtype=kept_in, device=device) for _ in range(3))
    gradient = torch.zeros_like(weight, dtype=gradients_in)
    halves = halves_of(Piece(weight), 0) if stochastic else None
    numbers = torch.ones(8, device=device)
    try:
        with torch.no_grad():  # as updates are: what is compiled holds for one or the other
            kernel(weight, gradient, first, second, halves, numbers)
    except Exception as error:  # a compiler that is missing or broken shows in many ways
        warnings.warn(f"AdamW runs without torch.compile, some times slower: {error}", stacklevel=2)
        return None
    return kernel


class Bf16AdamW:
    """AdamW whose moments have the weights' dtype, in PyTorch's names; implements `optim.Optimizer`.

    In bfloat16 weights and moments are 6 bytes a parameter. In float32 nothing is rounded.

    pieces: this rank's parts by name; a part may be empty. stochastic: how weights are rounded. compiles: let
    large parameters go through `compiled`, which is made in the first update: it is one for gradients' dtype.

    The step's number, which the checkpoint has, goes into the rounding: a resumed run draws the same bits.
    """

    def __init__(
        self,
        pieces: Mapping[str, Piece],
        optim: OptimConfig,
        seed: int,
        platform: Platform,
        *,
        stochastic: bool,
    ) -> None:
        self.pieces = pieces
        self.optim = optim
        self.seed = seed
        self.platform = platform
        self.stochastic = stochastic
        self.state = {
            piece.values: {
                "step": torch.zeros((), dtype=torch.float32),  # on the host, which reads it
                "exp_avg": torch.zeros_like(piece.values),
                "exp_avg_sq": torch.zeros_like(piece.values),
            }
            for piece in pieces.values()
        }
        elements = sum(piece.values.numel() for piece in pieces.values())
        self.compiles = elements >= COMPILED_FROM and platform.compiles()

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor], lr: float, scale: Tensor | None) -> None:
        """See `optim.Optimizer`."""
        made: dict[tuple[int, float], Tensor] = {}  # by step and decay: one copy to the device
        for name, gradient in gradients.items():
            piece = self.pieces[name]
            state = self.state[piece.values]
            state["step"] += 1
            if not piece.values.numel():
                continue
            step, decay = int(state["step"]), weight_decay(piece.values, self.optim)
            if (step, decay) not in made:
                made[step, decay] = numbers_of(step, lr, decay, self.optim, scale, self.platform)
            halves = halves_of(piece, rounding_key(self.seed, step, name)) if self.stochastic else None
            weight, grad = as_matrix(piece.values), as_matrix(gradient)
            first, second = as_matrix(state["exp_avg"]), as_matrix(state["exp_avg_sq"])
            self._kernel(weight, grad.dtype)(weight, grad, first, second, halves, made[step, decay])

    def _kernel(self, weight: Tensor, gradients_in: torch.dtype) -> Kernel:
        if not self.compiles or weight.numel() < MATRIX_FROM or 1 in weight.shape:
            return in_chunks
        how = self.platform.compile_backend, self.platform.compiles_any_shape
        return compiled(weight.device, gradients_in, self.stochastic, weight.dtype, *how) or in_chunks


def weight_decay(weight: Tensor, optim: OptimConfig) -> float:
    """Of `weight`: `optim.decay=matrices` spares the vectors (norm gains), as most Llama recipes do."""
    return optim.weight_decay if optim.decay == "all" or weight.dim() > 1 else 0.0
