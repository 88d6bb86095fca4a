"""How the lanes are dealt to the data-parallel ranks, and the cursor cut and put together by it."""

import numpy as np

from trainwright.configs.degrees import rows_in_a_batch as rows_in_a_batch  # the stream takes it from here
from trainwright.trainers.parallel.ranks import Ranks


def owned_lanes(lanes: int, rank: int, ranks: int) -> range:
    """The contiguous lanes of a data-parallel rank, dealt as evenly as they go."""
    return range(rank * lanes // ranks, (rank + 1) * lanes // ranks)


def own_cursor(whole: np.ndarray, ranks: Ranks) -> np.ndarray:
    """Of the whole cursor, (lanes, width), the rows of this rank's lanes."""
    own = owned_lanes(len(whole), ranks.data_rank, ranks.data_ranks)
    return whole[own.start : own.stop]


def whole_cursor(own: np.ndarray, ranks: Ranks) -> np.ndarray:
    """The whole cursor, (lanes, width), from every rank's rows of it; all ranks must call it."""
    rows = dict(ranks.gather((ranks.data_rank, own)))  # ranks with the same sequences have the same rows
    return np.concatenate([rows[rank] for rank in range(ranks.data_ranks)])
