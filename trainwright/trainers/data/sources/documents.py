"""What every source comes down to: a numbered list of UTF-8 documents."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Documents(Protocol):
    """Documents by number.

    lengths: (documents,) int64, the bytes of each; may be memory-mapped.
    blocks: (blocks,) int64, the first document of each block where they are read a block at a time.
    skipped: how many were left out as broken (data.on_error=skip).
    """

    @property
    def lengths(self) -> np.ndarray: ...
    @property
    def blocks(self) -> np.ndarray | None: ...
    @property
    def skipped(self) -> int: ...

    def read(self, document: int) -> bytes | memoryview:
        """A document's text as UTF-8."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a source's options come from, for what it has to say: its key in the recipe and the cache."""

    key: str  # "data" or "data.mix.NAME"
    cache_dir: str
    lanes: int
