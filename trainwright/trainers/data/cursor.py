"""The cursor: one row of int64 per lane, from which the stream goes on without replaying.

A row has, for each source, the pieces finished and the tokens in them; then the source of the piece in
progress, the offset into it (0: none is in progress), the sequences given, and the identity of the data.
"""

from collections.abc import Sequence

import numpy as np

from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.data.permutation import key_of
from trainwright.trainers.data.source import Source

GIVEN, IDENTITY = -2, -1  # columns
NO_IDENTITY = 0  # of a stream that nobody resumes


def new_cursor(lanes: int, sources: int, identity: int = NO_IDENTITY) -> np.ndarray:
    """The cursor of a stream that hasn't begun: (lanes, 2 * sources + 4)."""
    cursor = np.zeros((lanes, 2 * sources + 4), dtype=np.int64)
    cursor[:, IDENTITY] = identity
    return cursor


def identity_of(recipe: Recipe, sources: Sequence[Source]) -> int:
    """A number for what makes positions mean the same pieces: the sources' sizes and names, the seed."""
    sizes = [(source.name, source.pieces, source.total_bytes) for source in sources]
    return key_of("data", recipe.seed, recipe.data.max_piece_bytes, sizes) >> 1  # fits an int64


def check_cursor(cursor: np.ndarray, recipe: Recipe, sources: Sequence[Source]) -> None:
    """Raise BadRequest unless `cursor` is of this recipe's data."""
    width = new_cursor(1, len(sources)).shape[1]
    if cursor.ndim != 2 or cursor.shape[1] != width:
        raise BadRequest(
            f"the checkpoint's data cursor is of other sources than this recipe's {len(sources)}: resume with "
            "the checkpoint's data.mix, or start afresh with resume=none"
        )
    if (cursor[:, IDENTITY] != identity_of(recipe, sources)).any():
        raise BadRequest(
            "the data isn't what the checkpoint was trained on (its files, the seed or data.max_piece_bytes "
            "changed), so the run can't go on where it was: restore them, or start afresh with resume=none"
        )
