"""From lanes to batches: which lanes a batch takes, how many sequences of each, and the cursor after it."""

from collections.abc import Sequence

import numpy as np
import torch

from trainwright.errors import BadRequest
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.cursor import GIVEN, IDENTITY
from trainwright.trainers.data.dealing import owned_lanes, rows_in_a_batch
from trainwright.trainers.data.lane import Lane
from trainwright.trainers.data.packing import pack
from trainwright.trainers.data.refill import Refill
from trainwright.trainers.data.source import Source
from trainwright.trainers.data.tokenizer import Tokenizer


class Batcher:
    """Makes one rank's batches, one after the other, each of as many rows as the other ranks' have.

    Args:
        cursor: the whole cursor, (lanes, width), all ranks' rows.
        batch_size: sequences in a batch over all ranks; a multiple or a divisor of the number of lanes.
        epochs: passes over each source after which it ends; None for no end.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        cursor: np.ndarray,
        *,
        batch_size: int,
        seq_len: int,
        epochs: int | None = None,
        document_mask: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        lanes = len(cursor)
        if min(lanes, batch_size) < ranks:
            raise BadRequest(
                f"{lanes} lanes and train.global_batch_size={batch_size} can't feed {ranks} data-parallel "
                f"ranks: both must be at least {ranks}"
            )
        if batch_size % lanes and lanes % batch_size:
            raise BadRequest(
                f"train.global_batch_size={batch_size} is neither a multiple nor a divisor of the stream's "
                f"{lanes} lanes; {lanes} would be"
            )
        self._tokenizer, self._seq_len, self._document_mask = tokenizer, seq_len, document_mask
        self._sequences, self._turns = max(1, batch_size // lanes), max(1, lanes // batch_size)
        # How much the lanes of each turn have given: the turn that is due is the one that gave least, so that
        # it follows from the cursor also where the batch size has changed.
        self._given = [int(cursor[turn :: self._turns, GIVEN].sum()) for turn in range(self._turns)]
        self._per_turn = lanes // self._turns * self._sequences
        self._rows = rows_in_a_batch(lanes, batch_size, ranks)

        ends = [None if not (epochs and source.pieces) else epochs * source.pieces for source in sources]
        weights = [source.weight for source in sources]
        own = owned_lanes(lanes, rank, ranks)
        self._lanes = [Lane(number, lanes, weights, ends, cursor[number, :IDENTITY]) for number in own]
        self._cursor = cursor[own.start : own.stop].copy()
        self._refill = Refill(sources, tokenizer, self._lanes)
        known = sum(source.pieces or 0 for source in sources)
        self._epochs_per_piece = lanes / (known * len(own)) if known else 0.0
        self._sources = len(sources)

    def next(self) -> Batch:
        """The next batch; past the end of every lane an `ended` one, again and again."""
        turn = self._given.index(min(self._given))
        self._given[turn] += self._per_turn
        lanes = [lane for lane in self._lanes if lane.number % self._turns == turn]
        width = self._sequences * self._seq_len
        self._fill(lanes, width)
        rows = [lane.give(self._sequences) for lane in lanes]
        for lane in lanes:
            self._cursor[lane.number - self._lanes[0].number, :IDENTITY] = lane.row()
        packed = pack(rows, width, self._seq_len, self._tokenizer.eos, self._document_mask)
        batch = Batch(
            tokens=torch.from_numpy(packed.tokens),
            targets=torch.from_numpy(packed.targets),
            documents=torch.from_numpy(packed.documents),
            cursor=self._cursor.copy(),
            epoch=float(self._cursor[:, : self._sources].sum() * self._epochs_per_piece),
            ended=all(lane.ended for lane in self._lanes),
        )
        return batch.filled_up(self._rows, self._tokenizer.eos)

    def buffered(self) -> int:
        """The tokens held for batches to come."""
        return int(sum(lane.held() for lane in self._lanes))

    def _fill(self, lanes: Sequence[Lane], width: int) -> None:
        short = list(lanes)
        while short := [lane for lane in short if not lane.fill(width, not self._document_mask)]:
            self._refill(short, width)
