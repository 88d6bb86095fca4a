"""Causal attention that skips what causality and documents hide, for a CPU.

Query rows go in blocks, each against those keys only that some row of it sees, by the matrix library's batch
products. PyTorch's own kernel on a CPU multiplies the full square for sequences up to 512 and whenever there is
a mask, and its backward's products are too small to be fast.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ROWS = 128  # queries in a block: more skip less, fewer make products too small
KEPT_LENGTH = 512  # longer sequences make their probabilities again: kept, they take length / 2 floats a query


def document_starts(documents: Tensor) -> Tensor:
    """The position at which each token's document starts; `documents` is (batch, length), non-decreasing."""
    return torch.searchsorted(documents, documents)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
    """Causal attention: q (batch, heads, length, head_dim), k and v with their own number of heads.

    starts: (batch, length) the first key that each query sees, non-decreasing, such as `document_starts`; None:
    each sequence is one document. bfloat16 is computed in float32.
    The result's memory is laid out as (batch, length, heads, head_dim).
    """
    keep = torch.is_grad_enabled() and q.shape[2] <= KEPT_LENGTH
    attended: Tensor = _attend(q, k, v, starts, keep)[0]
    return attended


# Operators of their own: `torch.compile` would unroll the loops and turn what is written in place into copies.
@torch.library.custom_op("trainwright::blockwise_attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """What was attended to and, if they are to be kept, each block's probabilities, one after the other."""
    out, kept = _attend_shapes(q, k, v, starts, keep)
    keys, values = _computed(k), _computed(v)
    queries, attended = (_by_group(t, k.shape[1]) for t in (_computed(q), out))
    scratch = None if keep else queries.new_empty(_block_numel(q))
    for b, rows, seen, probabilities, hidden in _blocks(q, k, starts, kept if keep else None, scratch):
        _softmax_of_scores(queries[b, :, rows], keys[b, :, seen], hidden, probabilities)
        block = torch.bmm(probabilities, values[b, :, seen])
        attended[b, :, rows] = block.view(attended[b, :, rows].shape)
    return out, kept


@_attend.register_fake
def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = q.shape
    blocks, rest = length // ROWS, length % ROWS  # `divmod` takes no symbolic length
    pairs = ROWS**2 * blocks * (blocks + 1) // 2 + rest * length
    kept = q.new_empty((batch, heads * pairs if keep else 0), dtype=_computing_dtype(q))
    return _empty_by_position(q), kept


@torch.library.custom_op("trainwright::blockwise_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    groups, scale = k.shape[1], q.shape[3] ** -0.5
    grad_q, grad_k, grad_v = _attend_backward_shapes(grad, q, k, v, kept, starts)
    queries, grads, grad_queries = (_by_group(t, groups) for t in (_computed(q), _computed(grad), grad_q))
    keys, values = _computed(k), _computed(v)
    grad_keys, grad_values = (torch.zeros_like(t, dtype=kept.dtype) for t in (grad_k, grad_v))
    again = not kept.numel()
    scratch = queries.new_empty(_block_numel(q)) if again else None
    scores = queries.new_empty(_block_numel(q))
    for b, rows, seen, probabilities, hidden in _blocks(q, k, starts, None if again else kept, scratch):
        asking, incoming = queries[b, :, rows].flatten(1, 2), grads[b, :, rows].flatten(1, 2)
        if again:
            _softmax_of_scores(queries[b, :, rows], keys[b, :, seen], hidden, probabilities)
        grad_values[b, :, seen] += torch.bmm(probabilities.mT, incoming)
        grad_scores = scores[: probabilities.numel()].view(probabilities.shape)
        torch.bmm(incoming, values[b, :, seen].mT, out=grad_scores)
        torch._softmax_backward_data(grad_scores, probabilities, -1, kept.dtype, grad_input=grad_scores)
        block = torch.bmm(grad_scores, keys[b, :, seen]).mul_(scale)
        grad_queries[b, :, rows] = block.view(grad_queries[b, :, rows].shape)
        grad_keys[b, :, seen].add_(torch.bmm(grad_scores.mT, asking), alpha=scale)
    return grad_q, grad_keys.to(k.dtype), grad_values.to(v.dtype)


@_attend_backward.register_fake
def _attend_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_by_position(q), _empty_by_position(k), _empty_by_position(v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, _ = inputs
    ctx.set_materialize_grads(False)  # the probabilities have none, and as zeros it would be as large
    ctx.save_for_backward(q, k, v, output[1], starts)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return *_attend_backward(grad, *ctx.saved_tensors), None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


def _blocks(
    q: Tensor, k: Tensor, starts: Tensor | None, kept: Tensor | None, scratch: Tensor | None
) -> Iterator[tuple[int, slice, slice, Tensor, Tensor]]:
    """Each block of query rows: its sequence, its rows, the keys that it sees, and two tensors.

    The first has room for its probabilities (groups, rows x heads a group, keys), in `kept` if there is one.
    The second (rows, last keys) holds -inf where a row doesn't see a key: to be added to the scores.
    """
    (batch, heads, length, _), groups = q.shape, k.shape[1]
    room = scratch if kept is None else kept
    assert room is not None
    later = room.new_full((ROWS, ROWS), -torch.inf).triu_(1)
    begins = None if starts is None else starts.tolist()
    for b in range(batch):
        place = 0
        for start in range(0, length, ROWS):
            end = min(start + ROWS, length)
            first = 0 if begins is None else begins[b][start]
            hidden = later[: end - start, : end - start]
            if starts is not None and begins is not None and begins[b][end - 1] != first:
                position = torch.arange(first, end, device=q.device)
                unseen = position < starts[b, start:end, None]
                hidden = room.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
                hidden[:, start - first :] += later[: end - start, : end - start]
            shape = groups, (end - start) * (heads // groups), end - first
            size = shape[0] * shape[1] * shape[2]
            part = room[:size] if kept is None else kept[b, place : place + size]
            place += size
            yield b, slice(start, end), slice(first, end), part.view(shape), hidden


def _softmax_of_scores(queries: Tensor, keys: Tensor, hidden: Tensor, out: Tensor) -> None:
    """The probabilities of a block's queries (groups, rows, heads a group, head_dim) over its keys.

    No row is hidden from all keys: it sees its own.
    """
    out.baddbmm_(queries.flatten(1, 2), keys.mT, beta=0, alpha=queries.shape[-1] ** -0.5)
    out[..., -hidden.shape[1] :].unflatten(1, queries.shape[1:3]).add_(hidden.unsqueeze(1))
    torch.softmax(out, -1, out=out)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """(batch, heads, length, dim) as (batch, groups, length, heads a group, dim).

    The query heads that share a key become rows of one product: keys and values are never repeated.
    """
    grouped: Tensor = t.unflatten(1, (groups, -1))
    return grouped.transpose(2, 3)


def _empty_by_position(t: Tensor) -> Tensor:
    """Like `t` (batch, heads, length, dim), with all heads of a position side by side."""
    return t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2)


def _block_numel(q: Tensor) -> int:
    return q.shape[1] * min(ROWS, q.shape[2]) * q.shape[2]


def _computing_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _computed(t: Tensor) -> Tensor:
    return t.to(_computing_dtype(t))
