"""A source as the stream sees it: an endless, permuted sequence of pieces of text."""

from typing import NamedTuple, Protocol

import numpy as np


class Piece(NamedTuple):
    """A piece's text and whether its document ends with it."""

    text: str
    ends: bool


class Source(Protocol):
    """The pieces of one source by their position in the endless sequence of epochs.

    name: what its order is keyed by, with the seed.
    weight: its share of the tokens among several.
    pieces: in an epoch; None where that isn't known (and total_bytes and documents are 0).
    mean_bytes: of a piece.
    skipped: documents left out as broken.
    """

    name: str
    weight: float
    pieces: int | None
    total_bytes: int
    documents: int
    skipped: int
    mean_bytes: float

    def read(self, positions: np.ndarray) -> list[Piece]:
        """The pieces at `positions`, (n,) int64."""
        ...
