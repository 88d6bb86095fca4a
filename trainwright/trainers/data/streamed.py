"""A hub data set that is read over the network, shard by shard, without fetching it first.

Lane j of L reads the shards at places j, j+L, ... of each epoch's permutation of the shards. Nothing is
indexed: a lane that resumes reads its shards again up to where it was.
"""

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import numpy as np

from trainwright.configs.schema import SourceConfig
from trainwright.errors import BadRequest
from trainwright.trainers.data.permutation import key_of, permute
from trainwright.trainers.data.pieces import count_slices, cut
from trainwright.trainers.data.source import Piece, Source
from trainwright.trainers.data.sources.documents import Place
from trainwright.trainers.data.sources.hub import load

TYPICAL_BYTES = 2048.0  # of a piece, until more is known; only how much is read ahead depends on it


def open_streamed(config: SourceConfig, place: Place, name: str, *, seed: int, limit: int) -> Source:
    """The pieces of a streaming data set.

    Raises:
        BadRequest: fewer shards than lanes, or what `load` has to say.
    """
    if len(config.paths) != 1:
        raise BadRequest(
            f"{place.key}.paths must name one data set with streaming=true: give several as data.mix"
        )
    dataset = load(config.paths[0], config, place.key, streaming=True)
    if dataset.num_shards < place.lanes:
        shown = config.paths[0]
        raise BadRequest(
            f"{place.key}.streaming=true needs a shard for each of the {place.lanes} lanes and {shown} has "
            f"{dataset.num_shards}: fetch it with `trainwright data data=hub data.paths=[{shown}] "
            "data.streaming=false` and train with data.streaming=false"
        )
    return StreamedSource(dataset, config, place, name, seed=seed, limit=limit)


class StreamedSource:
    """Pieces in the order in which each lane's shards give them."""

    pieces: int | None = None
    total_bytes = documents = 0

    def __init__(
        self, dataset: Any, config: SourceConfig, place: Place, name: str, *, seed: int, limit: int
    ) -> None:
        self.name, self.weight, self.mean_bytes, self.skipped = name, config.weight, TYPICAL_BYTES, 0
        self._dataset, self._config, self._place = dataset, config, place
        self._seed, self._limit = seed, limit
        self._open: dict[int, tuple[int, Iterator[Piece]]] = {}  # by lane: pieces given, and those to come

    def read(self, positions: np.ndarray) -> list[Piece]:
        """The pieces at `positions`: piece m of lane j is at j + m * lanes."""
        return [
            self._piece(position % self._place.lanes, position // self._place.lanes)
            for position in positions.tolist()
        ]

    def _piece(self, lane: int, number: int) -> Piece:
        given, pieces = self._open.get(lane, (0, iter(())))
        if lane not in self._open or given > number:
            given, pieces = 0, self._pieces(lane)
        piece = next(islice(pieces, number - given, None))
        self._open[lane] = number + 1, pieces
        return piece

    def _pieces(self, lane: int) -> Iterator[Piece]:
        shards = self._dataset.num_shards
        for epoch in count():
            order = permute(np.arange(shards), shards, key_of(self._seed, self.name, epoch, "shards"))
            empty = True
            for shard in order[lane :: self._place.lanes].tolist():
                for row in self._dataset.shard(num_shards=shards, index=shard):
                    text = self._text(row)
                    of = int(count_slices(np.array([len(text)]), self._limit)[0])
                    for index in range(of):
                        empty = False
                        piece = text if of == 1 else cut(text, index, of, self._limit)
                        yield Piece(str(piece, "utf-8"), index == of - 1)
            if empty:
                raise BadRequest(
                    f"{self._config.paths[0]}: the shards of lane {lane} hold no text: fetch it instead"
                )

    def _text(self, row: dict[str, Any]) -> bytes:
        if self._config.text_key not in row:
            raise BadRequest(
                f"{self._config.paths[0]} has no column {self._config.text_key}, only {', '.join(row)}: "
                f"set {self._place.key}.text_key to one of them"
            )
        return str(row[self._config.text_key] or "").encode()
