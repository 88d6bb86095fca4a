"""One lane: which piece comes next, and where in it the next sequence begins.

Its state is a row of the cursor, without the identity (`trainwright.trainers.data.cursor`).
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill the unit interval evenly at every count


class Lane:
    """The lane `number` of `lanes`, over sources with `weights`, each of which ends before a position.

    ends: for each source the position past its last epoch; None where it has no end.
    """

    def __init__(
        self, number: int, lanes: int, weights: Sequence[float], ends: Sequence[int | None], row: np.ndarray
    ) -> None:
        count = len(weights)
        state = [int(value) for value in row]
        self.number, self._lanes, self._weights, self._ends = number, lanes, weights, ends
        self.pieces, self.tokens = state[:count], state[count : 2 * count]
        self.source, self.offset, self.given = state[2 * count :]
        self.asked = list(self.pieces)  # pieces of each source that were asked for
        self.coming = [0.0] * count  # tokens of each source asked for and not finished
        self._ahead: list[deque[np.ndarray]] = [deque() for _ in weights]
        self._piece: np.ndarray | None = None  # the piece in progress
        self._parts: list[np.ndarray] = []
        self._stops: list[int] = []
        self._filled = 0
        self.ended = False
        self._order = range(count)
        self._first = self._dealt() if count > 1 and not any(self.tokens) else None

    def row(self) -> list[int]:
        """The state, as of the last `give`."""
        return [*self.pieces, *self.tokens, self.source if self.offset else 0, self.offset, self.given]

    def missing(self, tokens: int) -> float:
        """How many of `tokens` tokens are neither in hand nor asked for, as far as is known."""
        return tokens - self._filled - sum(self.coming) + self.offset

    def fill(self, tokens: int, look_ahead: bool) -> bool:
        """Collect `tokens` tokens, and with `look_ahead` the piece after them; False: a piece is missing.

        The piece that is missing is the next one of `self.source`.
        """
        while self._filled < tokens or (look_ahead and self._piece is None):
            if self._piece is None and not self._next_piece():
                break
            piece = self._piece
            if piece is None:
                return False
            part = piece[self.offset : self.offset + tokens - self._filled]
            if len(part):
                self._parts.append(part)
                self._filled += len(part)
                self.offset += len(part)
            if self.offset == len(piece):
                self._finish(len(piece))
        return True

    def give(self, sequences: int) -> tuple[list[np.ndarray], list[int], int | None]:
        """What `fill` collected: its parts, where pieces end in it, and the token after it, if there is one."""
        parts, stops, piece = self._parts, self._stops, self._piece
        self.ended = not parts
        self._parts, self._stops, self._filled = [], [], 0
        self.given += sequences
        return parts, stops, None if piece is None else int(piece[self.offset])

    def held(self) -> int:
        """The tokens in memory, those of the piece in progress included."""
        in_progress = 0 if self._piece is None else len(self._piece)
        return in_progress + sum(len(piece) for queue in self._ahead for piece in queue)

    def receive(self, source: int, piece: np.ndarray, expected: float) -> None:
        """Take a piece that was asked for and counted as `expected` tokens."""
        self._ahead[source].append(piece)
        self.coming[source] += len(piece) - expected

    def furthest_behind(self) -> int | None:
        """The source to ask for, counting what is coming as taken; None past the end of all."""
        if len(self._order) == 1:
            return 0 if self._has(0, self.asked[0]) else None
        open_ = [s for s in self._order if self._has(s, self.asked[s])]
        return min(open_, key=lambda s: (self.tokens[s] + self.coming[s]) / self._weights[s], default=None)

    def ask(self, source: int, expected: float) -> tuple[int, float] | None:
        """The position of the source's next piece and how many tokens it now counts as; None past its end.

        A piece that a resumed lane is in the middle of has `expected` tokens after the offset: to count
        it as fewer would have the lane ask for others that it doesn't need yet.
        """
        if not self._has(source, self.asked[source]):
            return None
        if self.offset and source == self.source and self.asked[source] == self.pieces[source]:
            expected += self.offset
        position = self.number + self.asked[source] * self._lanes
        self.asked[source] += 1
        self.coming[source] += expected
        return position, expected

    def _next_piece(self) -> bool:
        """Choose the next source and take its next piece, if that is there; False past the end of all."""
        if not self.offset:
            chosen = self._choose()
            if chosen is None:
                return False
            self.source = chosen
        if self._ahead[self.source]:
            self._piece = self._ahead[self.source].popleft()
        return True

    def _choose(self) -> int | None:
        if len(self._order) == 1:
            return 0 if self._has(0, self.pieces[0]) else None
        open_ = [s for s in self._order if self._has(s, self.pieces[s])]
        if self._first in open_:
            return self._first
        return min(open_, key=lambda s: self.tokens[s] / self._weights[s], default=None)

    def _has(self, source: int, pieces: int) -> bool:
        end = self._ends[source]
        return end is None or self.number + pieces * self._lanes < end

    def _dealt(self) -> int:
        """The source a lane begins with, where all are equally behind: dealt over the lanes by weight."""
        share = np.cumsum(self._weights) / sum(self._weights)
        return int(np.searchsorted(share, self.number * GOLDEN % 1.0, side="right"))

    def _finish(self, length: int) -> None:
        if self._filled and length:
            self._stops.append(self._filled - 1)
        self.pieces[self.source] += 1
        self.tokens[self.source] += length
        self.coming[self.source] -= length
        self.offset, self._piece, self._first = 0, None, None
