"""From the lanes' tokens to a batch's arrays."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainwright.trainers.data.batch import IGNORE


class Packed(NamedTuple):
    """(sequences, seq_len) each: int64 tokens and targets, int32 documents."""

    tokens: np.ndarray
    targets: np.ndarray
    documents: np.ndarray


Given = tuple[list[np.ndarray], list[int], int | None]


def pack(rows: Sequence[Given], width: int, seq_len: int, pad: int, document_mask: bool) -> Packed:
    """Cut each row of `width` tokens into sequences, row by row.

    A row is its runs of tokens, the places of pieces' last tokens in it and the token that follows it. A
    lane that has ended is filled up with `pad`, and nothing there has a target. With `document_mask`, a
    piece's last token has no target and the pieces in a sequence are numbered.
    """
    tokens = np.full((len(rows), width), pad, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    starts = np.zeros((len(rows), width), dtype=np.int32)
    for row, (parts, stops, following) in enumerate(rows):
        if not parts:
            continue
        run = parts[0] if len(parts) == 1 else np.concatenate(parts)
        tokens[row, : len(run)] = run
        targets[row, : len(run) - 1] = run[1:]
        if following is not None:
            targets[row, len(run) - 1] = following
        if document_mask and stops:
            last = np.array(stops)
            targets[row, last] = IGNORE
            starts[row, last[last + 1 < width] + 1] = 1
    sequences = (-1, seq_len)
    starts = starts.reshape(sequences)
    starts[:, 0] = 0
    return Packed(
        tokens.reshape(sequences), targets.reshape(sequences), np.cumsum(starts, axis=1, dtype=np.int32)
    )
