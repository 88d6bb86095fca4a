"""Documents that can only be read a block at a time: a row group, a compressed file."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

import numpy as np

CACHE_BYTES = 1 << 28  # of blocks kept at hand; the two newest stay whatever their size

Text = bytes | memoryview


class Rows(Protocol):
    """The documents of one block, by their number in it."""

    def __getitem__(self, row: int) -> Text: ...


class BlockDocuments:
    """Documents in blocks, the last few of which are kept.

    Args:
        lengths: (documents,) bytes of each.
        firsts: (blocks,) the first document of each block.
        load: the documents of a block, by its number.
    """

    def __init__(
        self, lengths: np.ndarray, firsts: np.ndarray, skipped: int, load: Callable[[int], Rows]
    ) -> None:
        self.lengths, self.blocks, self.skipped = lengths, firsts, skipped
        self._load, self._bytes = load, 0
        self._kept: OrderedDict[int, Rows] = OrderedDict()

    def read(self, document: int) -> Text:
        block = int(np.searchsorted(self.blocks, document, side="right")) - 1
        if block not in self._kept:
            self._keep(block)
        self._kept.move_to_end(block)
        return self._kept[block][document - int(self.blocks[block])]

    def _keep(self, block: int) -> None:
        self._kept[block] = self._load(block)
        self._bytes += self._size(block)
        while self._bytes > CACHE_BYTES and len(self._kept) > 2:
            self._bytes -= self._size(self._kept.popitem(last=False)[0])

    def _size(self, block: int) -> int:
        edges = [*self.blocks[block : block + 2].tolist(), len(self.lengths)]
        return int(self.lengths[edges[0] : edges[1]].sum())
