"""The language-model head and its loss in one, so that the logits are never all alive.

A sequence's logits dwarf everything else in a small model's step (2048 tokens x 128 k words are 1 GiB in
fp32). They are made a chunk of tokens at a time, and since the loss is the last thing computed, each
chunk's gradient is taken at once, from the same logits, instead of making them again in the backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_ELEMENTS = 1 << 23  # logits alive at a time


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        want_hidden, want_weight, _ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None

        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight)
            wanted = targets[part] != IGNORE
            index = torch.where(wanted, targets[part], 0).unsqueeze(1)
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            total -= (log_probs.gather(1, index).squeeze(1) * wanted).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # d loss / d logits = softmax - one-hot, and zero rows where there is no target.
            grad = log_probs.exp_()
            grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
            grad = grad.mul_(wanted.unsqueeze(1)).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        ctx.grads = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.grads
        del ctx.grads
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(grad).to(ctx.weight_dtype),
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy, in nats, of `hidden @ weight.T` against `targets`: a float32 scalar.

    hidden: (..., d); weight: (vocabulary, d); targets: (...) int64, IGNORE where there is none.
    Its gradient can be taken once.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, targets.flatten()
    )
    return loss
