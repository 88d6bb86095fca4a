"""What the stream gives to the loop."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainwright.models.cross_entropy import IGNORE

__all__ = ["IGNORE", "Batch"]


@dataclass(frozen=True)
class Batch:
    """One optimizer step's sequences of one rank, and where its lanes stand after them.

    tokens: (rows, seq_len) int64. Sequences by lane; the last rows may be blank, so that all ranks have equally
        many, and a blank row has no target.
    targets: (rows, seq_len) int64, the next token of the same document, IGNORE where there is none.
    documents: (rows, seq_len) int32, the number of each token's document within its sequence: 0, 1, 2, ...
    cursor: (lanes, width) int64, the state after this batch of the rank's lanes, to go into the checkpoint.
    ended: every lane of this rank is past its last epoch; nothing in the batch has a target.
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

    def filled_up(self, rows: int, eos: int) -> "Batch":
        """The same batch with blank rows up to `rows` rows; itself where it has so many."""
        missing = rows - len(self.tokens)
        if not missing:
            return self
        below = (0, 0, 0, missing)
        return replace(
            self,
            tokens=F.pad(self.tokens, below, value=eos),
            targets=F.pad(self.targets, below, value=IGNORE),
            documents=F.pad(self.documents, below),
        )

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its tensors on `device`, all int32: not every device has int64."""
        return replace(
            self,
            tokens=self.tokens.int().to(device, non_blocking=True),
            targets=self.targets.int().to(device, non_blocking=True),
            documents=self.documents.to(device, non_blocking=True),
        )
