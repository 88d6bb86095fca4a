"""In which order an epoch visits the pieces of one source.

Where documents are read at random, all pieces are permuted. Where they can only be read a block at a time
(a row group, a compressed file), the blocks are permuted, and the pieces within each.
"""

from functools import lru_cache

import numpy as np

from trainwright.trainers.data.permutation import key_of, permute


class Order:
    """From positions in the endless sequence of epochs to piece numbers.

    Args:
        count: pieces in an epoch.
        key: what the order depends on: (seed, the source's name).
        blocks: (blocks + 1,) the first piece of each block and the end of the last; None without blocks.
    """

    def __init__(self, count: int, key: tuple[object, ...], blocks: np.ndarray | None = None) -> None:
        self.count, self._key, self._blocks = count, key, blocks
        self._block_order = lru_cache(maxsize=2)(self._order_blocks)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The piece at each of `positions`, (n,) int64."""
        epochs, index = np.divmod(positions, self.count)
        out = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = self._in_epoch(int(epoch), index[chosen])
        return out

    def _in_epoch(self, epoch: int, index: np.ndarray) -> np.ndarray:
        if self._blocks is None:
            return permute(index, self.count, key_of(*self._key, epoch))
        order, starts = self._block_order(epoch)
        turn = np.searchsorted(starts, index, side="right") - 1
        out = np.empty_like(index)
        for t in np.unique(turn):
            block, chosen = int(order[t]), turn == t
            first, end = int(self._blocks[block]), int(self._blocks[block + 1])
            inside = permute(index[chosen] - starts[t], end - first, key_of(*self._key, epoch, block))
            out[chosen] = first + inside
        return out

    def _order_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of blocks and the position at which each begins."""
        assert self._blocks is not None
        sizes = np.diff(self._blocks)
        order = permute(np.arange(len(sizes)), len(sizes), key_of(*self._key, epoch, "blocks"))
        return order, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[order])[:-1]])
