"""How documents are cut into pieces, and which piece is which.

A document of at most `limit` bytes is one piece. A longer one is n = ceil(bytes / (limit - window)) slices,
cut near k * bytes / n: moved back to just after the last whitespace within the window, else to the start
of a character. So the number of pieces follows from the documents' lengths alone.
"""

from collections.abc import Callable, Iterator

import numpy as np

SMALLEST_LIMIT = 16  # below it, a window has no room for a character of four bytes
LONGEST_WINDOW = 4096
CHUNK = 1 << 22  # documents counted at a time, so that a large index needs little memory


def window_of(limit: int) -> int:
    """How many bytes a cut may move back."""
    return min(LONGEST_WINDOW, limit // 4)


def count_slices(lengths: np.ndarray, limit: int) -> np.ndarray:
    """The number of pieces of documents of `lengths` bytes; an empty document has none."""
    reach = limit - window_of(limit)
    return np.where(lengths <= limit, np.minimum(lengths, 1), -(-lengths // reach))


def cut(document: bytes | memoryview, index: int, of: int, limit: int) -> bytes:
    """The `index`-th of `of` slices of a UTF-8 document."""
    start = _boundary(document, index, of, limit)
    return bytes(document[start : _boundary(document, index + 1, of, limit)])


def _boundary(document: bytes | memoryview, index: int, of: int, limit: int) -> int:
    if index in (0, of):
        return index and len(document)
    nominal = index * len(document) // of
    before = bytes(document[nominal - window_of(limit) : nominal])
    space = max(before.rfind(mark) for mark in (b" ", b"\n", b"\t", b"\r"))
    if space >= 0:
        return nominal - len(before) + space + 1
    while document[nominal] & 0xC0 == 0x80:  # inside a character
        nominal -= 1
    return nominal


class PieceTable:
    """Numbers the pieces of the documents that `keep` lets through, in document order.

    Only the documents that aren't exactly one piece (long, empty, held out) are stored.

    Args:
        lengths: (documents,) bytes of each; may be memory-mapped.
        limit: `data.max_piece_bytes`.
        keep: from document numbers to a mask; all are kept unless given.
    """

    def __init__(
        self, lengths: np.ndarray, limit: int, keep: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        odd, counts = [], []
        self.total_bytes = self.documents = 0
        for first, chunk in _chunks(lengths):
            number = np.arange(first, first + len(chunk), dtype=np.int64)
            count = count_slices(chunk, limit)
            if keep is not None:
                count = np.where(keep(number), count, 0)
            self.total_bytes += int(chunk[count > 0].sum())
            self.documents += int((count > 0).sum())
            odd.append(number[count != 1])
            counts.append(count[count != 1])
        self._odd = np.concatenate([np.empty(0, np.int64), *odd])
        self._counts = np.concatenate([np.empty(0, np.int64), *counts])
        surplus = np.cumsum(self._counts - 1)
        self._surplus = np.concatenate([np.zeros(1, np.int64), surplus])
        self._first = self._odd + self._surplus[:-1]  # each odd document's first piece
        self.count = len(lengths) + int(self._surplus[-1])

    def first_piece(self, documents: np.ndarray) -> np.ndarray:
        """The number of the first piece at or after each of `documents`."""
        return np.asarray(documents + self._surplus[np.searchsorted(self._odd, documents)])

    def locate(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each piece: its document, which slice of it it is, and how many slices there are."""
        if not len(self._odd):
            return pieces, np.zeros_like(pieces), np.ones_like(pieces)
        odd = np.searchsorted(self._first, pieces, side="right") - 1
        known = np.maximum(odd, 0)
        inside = (odd >= 0) & (pieces < self._first[known] + self._counts[known])
        documents = np.where(inside, self._odd[known], pieces - self._surplus[odd + 1])
        slices = np.where(inside, pieces - self._first[known], 0)
        return documents, slices, np.where(inside, self._counts[known], 1)


def _chunks(lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, len(lengths), CHUNK):
        yield first, np.asarray(lengths[first : first + CHUNK], dtype=np.int64)
