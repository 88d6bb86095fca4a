"""The language-model head and its loss in one, so that the logits are never all alive.

A sequence's logits dwarf everything else in a small model's step (2048 tokens x 128 k words are 1 GiB in
fp32). They are made a chunk of tokens at a time, and since the loss is the last thing computed, each
chunk's gradient is taken at once, from the same logits, instead of making them again in the backward.

The head's rows may be shared out among ranks (`VocabularyShard`): then each makes the logits of its own words
only, and three numbers a token are all that travels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a position without a target, as in PyTorch's own cross-entropy
CHUNK_ELEMENTS = 1 << 23  # logits alive at a time: 32 MiB in fp32


class VocabularyShard(NamedTuple):
    """Which words' rows of the head are here, and how the ranks that have the others are asked.

    first: the first of them. sum, max: combine a float32 tensor with the other ranks', in place.
    """

    first: int
    sum: Callable[[Tensor], object]
    max: Callable[[Tensor], object]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        want_grads: bool,
        shard: VocabularyShard | None,
    ) -> Tensor:
        want_hidden, want_weight = (want and want_grads for want in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight: Tensor | None = None

        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            wanted = (targets[part] != IGNORE).unsqueeze(1)
            own = targets[part].unsqueeze(1) - (shard.first if shard else 0)
            here = wanted & (own >= 0) & (own < weight.shape[0])  # the target's row is on this rank
            index = torch.where(here, own, 0).long()
            losses, grad = _softmax(F.linear(hidden[part], weight), index, here, shard)
            total += (losses * wanted).sum()
            if not (want_hidden or want_weight):
                continue
            # d loss / d logits = softmax - one-hot. Where there is no target it is zero, which is said to the
            # narrow factors of the two products instead of to all of the vocabulary.
            grad = grad.scatter_add_(1, index, -here.to(grad.dtype)).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part]).mul_(wanted)
            if want_weight:
                grad_weight = _add_product(grad_weight, grad.T, hidden[part] * wanted)
        ctx.grads = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad,) = grads
        grad_hidden, grad_weight = ctx.grads
        del ctx.grads
        return (
            None if grad_hidden is None else grad_hidden.mul_(grad),
            None if grad_weight is None else grad_weight.mul_(grad).to(ctx.weight_dtype),
            None,
            None,
            None,
        )


def _softmax(
    logits: Tensor, index: Tensor, here: Tensor, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor]:
    """Losses (n, 1) and probabilities (n, words here), both float32, of `logits` (n, words here).

    index: (n, 1), the target's column, where it is `here`.
    """
    if shard is None:
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        return -log_probs.gather(1, index), log_probs.exp_()
    wide = logits.float()
    peak = wide.amax(1, keepdim=True)
    shard.max(peak)
    wide = wide.sub_(peak)
    target = wide.gather(1, index) * here
    exponentials = wide.exp_()
    mine = exponentials.sum(1, keepdim=True)
    sums = torch.cat((mine, target), 1)
    shard.sum(sums)
    total, target = sums.split(1, 1)
    # Zero, or NaN where this shard's logits aren't finite: an accelerator's sum may hide that from its peers.
    fault = mine * 0.0
    return total.log() - target + fault, exponentials.div_(total)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Total + a @ b, in fp32 where there is a total; in place."""
    if total is None:
        return a @ b
    if a.dtype == torch.float32:
        return total.addmm_(a, b)
    return total.float().add_((a @ b).float())


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard | None = None
) -> Tensor:
    """The summed cross-entropy, in nats, of `hidden @ weight.T` against `targets`: a float32 scalar.

    hidden: (..., d); weight: (vocabulary, d); targets: (...) int32 or int64, IGNORE where there is none.
    Its gradient can be taken once.

    With `shard`, `weight` is its rows only. The loss is that of the whole vocabulary, on every rank; the
    gradient of `hidden` is this shard's part, which the caller has to sum over the ranks.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, -2), weight, targets.flatten(), torch.is_grad_enabled(), shard
    )
    return loss
