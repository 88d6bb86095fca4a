"""Initial values: each element a function of (seed, separate weight's name, row, column).

So every layout starts from the same numbers, and so do coalesced and separate projections.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainwright.configs.schema import ModelConfig
from trainwright.models.counter_random import key_of, normal
from trainwright.models.storage import Piece, stored_weights

ELEMENTS_AT_ONCE = 1 << 20  # drawn at a time, which bounds the int32 scratch memory


@torch.no_grad()
def init_weights(pieces: Mapping[str, Piece], config: ModelConfig, seed: int) -> None:
    """Fill `pieces` in place: norms with 1, matrices with N(0, initializer_range) as the reference does.

    pieces: by the stored parameter's name, the part of it that is here.
    """
    for stored_name, separate in stored_weights(config):
        piece = pieces[stored_name]
        if piece.values.dim() == 1:
            piece.values.fill_(1.0)
            continue
        for name, rows in separate:
            _fill(piece, rows, key_of(seed, name), config.initializer_range)


def _fill(piece: Piece, stored_rows: Tensor | None, key: int, std: float) -> None:
    """Draw the elements of a separate weight that lie in `piece`."""
    values, device = piece.values, piece.values.device
    width = values.shape[1]
    columns = torch.arange(piece.column, piece.column + width, dtype=torch.int32, device=device)
    own, here = (rows.to(device) for rows in piece.rows_of(stored_rows))
    step = max(1, ELEMENTS_AT_ONCE // max(1, width))
    for start in range(0, len(own), step):
        drawn = normal(key, own[start : start + step].to(torch.int32), columns)
        values[here[start : start + step]] = drawn.mul_(std).to(values.dtype)
