"""A source whose documents are all known by an index."""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from trainwright.errors import BadRequest
from trainwright.trainers.data.order import Order
from trainwright.trainers.data.pieces import PieceTable, cut
from trainwright.trainers.data.source import Piece
from trainwright.trainers.data.sources.documents import Documents

LONG_DOCUMENTS = 4  # documents of several slices that are kept at hand


class IndexedSource:
    """Pieces found through an index and permuted by a computed order.

    Raises:
        BadRequest: when read, a document that turns out not to be UTF-8.
    """

    def __init__(
        self,
        name: str,
        weight: float,
        documents: Documents,
        *,
        seed: int,
        limit: int,
        keep: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.name, self.weight, self.skipped = name, weight, documents.skipped
        self._documents, self._limit = documents, limit
        self._table = PieceTable(documents.lengths, limit, keep)
        self.pieces: int | None = self._table.count
        self.total_bytes, self.documents = self._table.total_bytes, self._table.documents
        self.mean_bytes = self.total_bytes / max(self._table.count, 1)
        blocks = documents.blocks
        if blocks is not None:
            edges = np.concatenate([blocks, np.array([len(documents.lengths)])])
            blocks = self._table.first_piece(edges)
        self._order = Order(self._table.count, (seed, name), blocks)
        self._recent: OrderedDict[int, bytes | memoryview] = OrderedDict()

    def read(self, positions: np.ndarray) -> list[Piece]:
        """The pieces at `positions`, (n,) int64, read in the order in which they are stored."""
        pieces = self._order(positions)
        out: list[Piece | None] = [None] * len(pieces)
        located = [array.tolist() for array in self._table.locate(pieces)]
        for i in np.argsort(pieces).tolist():
            document, index, of = (column[i] for column in located)
            out[i] = self._read(document, index, of)
        return [piece for piece in out if piece is not None]

    def _read(self, document: int, index: int, of: int) -> Piece:
        whole = self._whole(document, of)
        piece = whole if of == 1 else cut(whole, index, of, self._limit)
        try:
            return Piece(str(piece, "utf-8"), index == of - 1)
        except UnicodeDecodeError:
            raise BadRequest(f"document {document} of {self.name} isn't UTF-8: mend or remove it") from None

    def _whole(self, document: int, of: int) -> bytes | memoryview:
        if of == 1:
            return self._documents.read(document)
        if document not in self._recent:
            self._recent[document] = self._documents.read(document)
            if len(self._recent) > LONG_DOCUMENTS:
                self._recent.popitem(last=False)
        return self._recent[document]
