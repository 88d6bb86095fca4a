"""Causal attention in which packed documents don't see each other, by the kernels that a device has.

The platform names the kernel that a model trains with; decoding always uses `Sdpa`. With a window a token
attends to so many, itself included (Mistral, arXiv 2310.06825).
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.models.blockwise_attention import KEPT_LENGTH, blockwise_attention, document_starts


class AttentionKernel(Protocol):
    """What attends, and what it needs to know of the documents, made once a batch for all layers."""

    def mask(self, documents: Tensor) -> Any:
        """What keeps documents apart; `documents` is (batch, length), non-decreasing."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        """Attend causally: q (batch, heads, length, head_dim), k and v with their own number of heads.

        `mask` None: each sequence is one document, in training no longer than the window.
        """


class Sdpa:
    """PyTorch's scaled dot-product attention with a boolean mask: every device has it."""

    def __init__(self, window: int | None = None) -> None:
        self.window = window

    def mask(self, documents: Tensor) -> Tensor:
        """(batch, 1, length, length) bool: true where a query may see a key."""
        same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
        return self._visible(same, 0).unsqueeze(1)

    def _visible(self, mask: Tensor, before: int) -> Tensor:
        """`mask` (..., queries, keys) in place, without later keys and such outside the window.

        before: how many keys there are before the first query's own.
        """
        mask.tril_(before)
        return mask if self.window is None else mask.triu_(before + 1 - self.window)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        queries, keys = q.shape[-2], k.shape[-2]
        # With fewer queries than keys (decoding) `is_causal` would align them at the wrong end.
        whole = self.window is None or keys <= self.window
        causal = mask is None and queries == keys and whole
        if mask is None and not causal and not (queries == 1 and whole):
            mask = self._visible(torch.ones(queries, keys, dtype=torch.bool, device=q.device), keys - queries)
        if q.shape[1] != k.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


class Flex:
    """FlexAttention, compiled: skips the blocks between documents (CUDA)."""

    def __init__(self, window: int | None = None) -> None:
        from torch.nn.attention.flex_attention import flex_attention

        self.window = window
        self._attend = torch.compile(flex_attention, dynamic=False)

    def mask(self, documents: Tensor) -> Any:
        """The block mask of causal attention within documents."""
        from torch.nn.attention.flex_attention import create_block_mask

        batch, length = documents.shape
        window = length if self.window is None else self.window

        def visible(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (query - key < window) & (documents[b, query] == documents[b, key])

        return create_block_mask(visible, batch, None, length, length, device=str(documents.device))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        if mask is None:
            return Sdpa()(q, k, v, None)
        attended: Tensor = self._attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return attended


class Blockwise:
    """`blockwise_attention` where it is faster than `Sdpa` (CPU): for training, from some length on.

    Without documents there is nothing left to gain beyond KEPT_LENGTH: Sdpa skips later keys there too. Its
    forward in low precision is so fast that only documents make up for it.
    """

    shortest = 256  # of sequences: for shorter ones the loop over them costs what it saves

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.short = Sdpa(window)

    def mask(self, documents: Tensor) -> Tensor:
        """(batch, length) the first key that each token sees; for short sequences that of Sdpa."""
        length = documents.shape[1]
        if length < self.shortest:
            return self.short.mask(documents)
        starts = document_starts(documents)
        if self.window is None:
            return starts
        return starts.maximum(torch.arange(length, device=starts.device) - (self.window - 1))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        queries, keys = q.shape[-2], k.shape[-2]
        if mask is None:
            full = q.dtype in (torch.float32, torch.float64)
            blockwise = full and queries == keys and self.shortest < queries <= KEPT_LENGTH
        else:
            blockwise = queries >= self.shortest
        return blockwise_attention(q, k, v, mask) if blockwise else self.short(q, k, v, mask)


KERNELS: dict[str, type[Sdpa] | type[Flex] | type[Blockwise]] = {
    "sdpa": Sdpa,
    "flex": Flex,
    "blockwise": Blockwise,
}
