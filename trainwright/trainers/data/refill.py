"""Tokenizes the pieces that lanes ask for, many at a time, so that the tokenizer's threads have work."""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trainwright.trainers.data.lane import Lane
from trainwright.trainers.data.source import Piece, Source
from trainwright.trainers.data.tokenizer import Tokenizer

BYTES_AT_A_TIME = 1 << 20  # of text in one call per thread: a tokenizer's own records are 30 times as large
REACH = 1 << 15  # tokens per thread that a refill gathers when it must run at all
FIRST_REACH = 1 << 10  # the first batch must not wait for a large refill, so the reach grows to REACH


class Request(NamedTuple):
    """A lane's wish for the piece at `position` of `source`, counted as `expected` tokens."""

    lane: Lane
    source: int
    position: int
    expected: float


class Refill:
    """Brings lanes their pieces. What it brings early changes how long a batch takes, never what is in it."""

    def __init__(self, sources: Sequence[Source], tokenizer: Tokenizer, lanes: Sequence[Lane]) -> None:
        self._sources, self._tokenizer, self._lanes = sources, tokenizer, lanes
        self._threads = tokenizer_threads()
        self._reach = FIRST_REACH
        self._bytes, self._tokens = 4.0, 1.0  # seen so far, for tokens per byte

    def __call__(self, short: Sequence[Lane], tokens: int) -> None:
        """Bring each lane of `short` the piece it lacks, and more towards `tokens` tokens a lane."""
        requests = [*self._needed(short, tokens)]
        requests += self._early(self._reach - sum(request.expected for request in requests), tokens)
        self._reach = min(2 * self._reach, REACH * self._threads)
        for part in self._read(requests):
            self._deliver(*zip(*part, strict=True))

    def _needed(self, short: Sequence[Lane], tokens: int) -> Iterator[Request]:
        for lane in short:
            source: int | None = lane.source
            while source is not None:
                request = self._ask(lane, source)
                if request is not None:
                    yield request
                if lane.missing(tokens) <= 0:
                    break
                source = lane.furthest_behind()

    def _early(self, budget: float, tokens: int) -> Iterator[Request]:
        """Pieces for the lanes that will be short next, until `budget` tokens are asked for."""
        waiting = sorted(self._lanes, key=lambda lane: -lane.missing(tokens))
        while budget > 0 and waiting:
            still = []
            for lane in waiting:
                source = lane.furthest_behind()
                request = None if source is None else self._ask(lane, source)
                if request is None:
                    continue
                yield request
                still.append(lane)
                budget -= request.expected
                if budget <= 0:
                    return
            waiting = still

    def _ask(self, lane: Lane, source: int) -> Request | None:
        expected = self._sources[source].mean_bytes * self._tokens / self._bytes
        asked = lane.ask(source, expected)
        return None if asked is None else Request(lane, source, *asked)

    def _read(self, requests: list[Request]) -> Iterator[list[tuple[Request, Piece]]]:
        """The requests with their texts, about `BYTES_AT_A_TIME` at a time, each source's in one go."""
        chunk: list[tuple[Request, Piece]] = []
        size, limit = 0, BYTES_AT_A_TIME * self._threads
        for number, source in enumerate(self._sources):
            own = [request for request in requests if request.source == number]
            step = max(1, int(limit / source.mean_bytes))
            for start in range(0, len(own), step):
                some = own[start : start + step]
                pieces = source.read(np.array([request.position for request in some], dtype=np.int64))
                for request, piece in zip(some, pieces, strict=True):
                    chunk.append((request, piece))
                    size += len(piece.text)
                    if size >= limit:
                        yield chunk
                        chunk, size = [], 0
        if chunk:
            yield chunk

    def _deliver(self, requests: Sequence[Request], pieces: Sequence[Piece]) -> None:
        for request, ids in zip(requests, self._tokenizer.encode_pieces(pieces), strict=True):
            request.lane.receive(request.source, ids, request.expected)
            self._tokens += len(ids)
        self._bytes += sum(len(piece.text) for piece in pieces)


def tokenizer_threads() -> int:
    """How many threads the tokenizer's library uses, by the variables that it reads."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("off", "false", "f", "no", "n", "0"):
        return 1
    threads = os.environ.get("RAYON_NUM_THREADS", "")
    return int(threads) if threads.isdigit() and int(threads) else os.cpu_count() or 1
