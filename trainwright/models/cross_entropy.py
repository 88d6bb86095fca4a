"""The language-model head and its loss in one, so that the logits are never all alive.

A sequence's logits dwarf everything else in a small model's step (2048 tokens x 128 k words are 1 GiB in
fp32). They are made a chunk of tokens at a time, and since the loss is the last thing computed, each
chunk's gradient is taken at once, from the same logits, instead of making them again in the backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a position without a target, as in PyTorch's own cross-entropy
CHUNK_ELEMENTS = 1 << 23  # logits alive at a time: 32 MiB in fp32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, want_grads: bool) -> Tensor:
        want_hidden, want_weight = (want and want_grads for want in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight: Tensor | None = None

        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            wanted = (targets[part] != IGNORE).unsqueeze(1)
            index = torch.where(wanted, targets[part].unsqueeze(1), 0)
            log_probs = F.log_softmax(F.linear(hidden[part], weight), dim=-1, dtype=torch.float32)
            total -= (log_probs.gather(1, index) * wanted).sum()
            if not (want_hidden or want_weight):
                continue
            # d loss / d logits = softmax - one-hot. Where there is no target it is zero, which is said to the
            # narrow factors of the two products instead of to all of the vocabulary.
            grad = log_probs.exp_().scatter_add_(1, index, log_probs.new_full(index.shape, -1.0))
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part]).mul_(wanted)
            if want_weight:
                grad_weight = _add_product(grad_weight, grad.T, hidden[part] * wanted)
        ctx.grads = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.grads
        del ctx.grads
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad),
            None if grad_weight is None else grad_weight.mul_(grad).to(ctx.weight_dtype),
            None,
            None,
        )


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Total + a @ b, in fp32 where there is a total; in place."""
    if total is None:
        return a @ b
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    return total.float().add_((a @ b).float())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy, in nats, of `hidden @ weight.T` against `targets`: a float32 scalar.

    hidden: (..., d); weight: (vocabulary, d); targets: (...) int64, IGNORE where there is none.
    Its gradient can be taken once.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, targets.flatten(), torch.is_grad_enabled()
    )
    return loss
