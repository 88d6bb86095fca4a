"""A source as the stream sees it: an endless, permuted sequence of pieces of text."""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from trainwright.configs.schema import Recipe, SourceConfig
from trainwright.errors import BadRequest
from trainwright.trainers.data.holdout import Part, holdout
from trainwright.trainers.data.order import Order
from trainwright.trainers.data.pieces import SMALLEST_LIMIT, PieceTable, cut
from trainwright.trainers.data.sources.documents import Documents, Place
from trainwright.trainers.data.sources.stdlib import open_stdlib
from trainwright.trainers.data.sources.text import open_text

OPENERS: dict[str, Callable[[SourceConfig, Place], Documents]] = {
    "text": open_text,
    "stdlib": open_stdlib,
}

LONG_DOCUMENTS = 4  # documents of several slices that are kept at hand


class Piece(NamedTuple):
    """A piece's text and whether its document ends with it."""

    text: str
    ends: bool


class Source:
    """The pieces of one source by their position in the endless sequence of epochs.

    Args:
        name: what its order is keyed by, with the seed.
        weight: its share of the tokens among several.
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
        self.pieces, self.bytes, self.documents = self._table.count, self._table.bytes, self._table.documents
        blocks = documents.blocks
        if blocks is not None:
            edges = np.concatenate([blocks, np.array([len(documents.lengths)])])
            blocks = self._table.first_piece(edges)
        self._order = Order(self.pieces, (seed, name), blocks)
        self._recent: OrderedDict[int, bytes | memoryview] = OrderedDict()

    @property
    def mean_bytes(self) -> float:
        """Bytes of a piece, on average."""
        return self.bytes / self.pieces

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
        if of == 1:
            return Piece(str(self._documents.read(document), "utf-8"), True)
        if document not in self._recent:
            self._recent[document] = self._documents.read(document)
            if len(self._recent) > LONG_DOCUMENTS:
                self._recent.popitem(last=False)
        return Piece(str(cut(self._recent[document], index, of, self._limit), "utf-8"), index == of - 1)


def open_sources(recipe: Recipe, part: Part = "train") -> list[Source]:
    """The recipe's sources, or what they hold out for validation.

    Raises:
        BadRequest: a source without text.
    """
    data = recipe.data
    if data.max_piece_bytes < SMALLEST_LIMIT:
        raise BadRequest(f"data.max_piece_bytes={data.max_piece_bytes} must be at least {SMALLEST_LIMIT}")
    named: dict[str, SourceConfig] = dict(data.mix) or {"data": data}
    return [_open(recipe, name, source, part) for name, source in named.items()]


def open_source(recipe: Recipe, name: str, source: SourceConfig) -> Source:
    """All of one source, nothing held out."""
    return _open(recipe, name, source, "all")


def _open(recipe: Recipe, name: str, config: SourceConfig, part: Part) -> Source:
    key = f"data.mix.{name}" if recipe.data.mix else "data"
    place = Place(key, recipe.data.cache_dir, recipe.data.lanes or recipe.train.global_batch_size)
    source = Source(
        name,
        config.weight,
        OPENERS[config.format](config, place),
        seed=recipe.seed,
        limit=recipe.data.max_piece_bytes,
        keep=holdout(name, recipe.data.validation.fraction, part),
    )
    if not source.pieces:
        raise BadRequest(_nothing(recipe, key, config, source, part))
    return source


def _nothing(recipe: Recipe, key: str, config: SourceConfig, source: Source, part: Part) -> str:
    fraction = recipe.data.validation.fraction
    if fraction and part != "all":
        left, change = ("held out", "raise") if part == "validation" else ("left to train on", "lower")
        return f"data.validation.fraction={fraction} has no document of {key} {left}: {change} it or add data"
    skipped = f" ({source.skipped} skipped as broken)" if source.skipped else ""
    return f"{key}.paths={config.paths} holds no text{skipped}: name files with documents in them"
