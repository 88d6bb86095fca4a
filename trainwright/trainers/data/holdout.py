"""Which documents are held out for validation: the same ones whatever the seed or the order."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from trainwright.trainers.data.permutation import hash64, key_of

Part = Literal["train", "validation", "all"]


def holdout(name: str, fraction: float, part: Part) -> Callable[[np.ndarray], np.ndarray] | None:
    """From document numbers to a mask of those in `part`; None where that is every one.

    A document is held out where a keyed hash of its number falls below `fraction`, so about that share is.
    """
    if not fraction or part == "all":
        return None
    key, below = np.uint64(key_of("holdout", name)), np.uint64(int(fraction * 2**32))

    def keep(documents: np.ndarray) -> np.ndarray:
        held: np.ndarray = hash64(hash64(documents.astype(np.uint64)) ^ key) >> np.uint64(32) < below
        return held if part == "validation" else ~held

    return keep
