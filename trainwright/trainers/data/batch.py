"""What the stream gives to the loop."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainwright.models.cross_entropy import IGNORE

__all__ = ["IGNORE", "Batch"]


@dataclass(frozen=True)
class Batch:
    """One optimizer step's sequences of one rank, and where its lanes stand after them.

    tokens: (lanes, seq_len) int64.
    targets: (lanes, seq_len) int64, the next token of the same document, IGNORE where there is none.
    documents: (lanes, seq_len) int32, the number of each token's document within its sequence: 0, 1, 2, ...
    cursor: (lanes, width) int64, the lanes' state after this batch, to go into the checkpoint with it.
    ended: every lane is past its last epoch; nothing in the batch has a target.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    cursor: np.ndarray
    epoch: float
    ended: bool = False

    def sequences(self, start: int, end: int) -> "Batch":
        """Sequences start..end-1 as a batch, such as a micro-batch."""
        part = slice(start, end)
        return replace(
            self, tokens=self.tokens[part], targets=self.targets[part], documents=self.documents[part]
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            documents=self.documents.to(device, non_blocking=True),
        )
