"""How far a run has come."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Progress:
    """The counters that a checkpoint keeps.

    tokens: target tokens trained on so far.
    cursor: the data lanes' state after the last batch trained on, (lanes, width) int64.
    ended: the data ended before the steps did.
    """

    step: int
    tokens: int
    cursor: np.ndarray
    ended: bool = False
