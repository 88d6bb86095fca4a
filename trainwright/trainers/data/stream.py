"""The stream of batches: a pure function of (recipe, seed, step), prepared ahead in the background."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np

from trainwright.configs.schema import Recipe
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.batcher import Batcher
from trainwright.trainers.data.cursor import check_cursor, identity_of, new_cursor
from trainwright.trainers.data.horizon import horizon
from trainwright.trainers.data.opening import open_sources
from trainwright.trainers.data.tokenizer import Tokenizer
from trainwright.trainers.data.validation import open_validation

__all__ = ["Stream", "horizon", "open_stream", "open_validation"]

PATIENCE = 0.1  # seconds between looks at whether the stream was closed


def open_stream(
    recipe: Recipe, tokenizer: Tokenizer, *, rank: int = 0, ranks: int = 1, cursor: np.ndarray | None = None
) -> "Stream":
    """The training batches of one data-parallel rank, from the start or from a checkpoint's cursor.

    `cursor` is the whole cursor, (lanes, width) int64: all ranks' rows of `Batch.cursor`, in order. The
    stream keeps that number of lanes whatever data.lanes says.

    Raises:
        BadRequest: data that can't be read, or a cursor that isn't of this data.
    """
    sources = open_sources(recipe, lanes=None if cursor is None else len(cursor))
    if cursor is None:
        lanes = recipe.data.lanes or recipe.train.global_batch_size
        cursor = new_cursor(lanes, len(sources), identity_of(recipe, sources))
    check_cursor(cursor, recipe, sources)
    batcher = Batcher(
        sources,
        tokenizer,
        cursor,
        batch_size=recipe.train.global_batch_size,
        seq_len=recipe.train.seq_len,
        epochs=recipe.train.epochs,
        document_mask=recipe.data.document_mask,
        rank=rank,
        ranks=ranks,
    )
    return Stream(batcher.next, cursor, recipe.data.prefetch)


class Stream:
    """An iterator of batches that a background thread makes ahead; it never stops of its own accord.

    Past the last epoch it keeps giving batches that are `ended`, so that data-parallel ranks stay in step
    until all of them are. An error of the background thread is raised by the `next` that would have had
    its batch.

    cursor: where the stream started, (lanes, width), all lanes.
    """

    def __init__(self, make: Callable[[], Batch], cursor: np.ndarray, ahead: int) -> None:
        self.cursor = cursor
        self._make = make
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="data-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        batch = self._ready.get()
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        return batch

    def close(self) -> None:
        """Stop the background thread and wait for it; batches made ahead are dropped."""
        self._closed.set()
        while self._thread.is_alive():
            self._thread.join(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                batch: Batch | BaseException = self._make()
            except BaseException as error:
                batch = error
            while not self._closed.is_set():
                try:
                    self._ready.put(batch, timeout=PATIENCE)
                    break
                except queue.Full:
                    continue
            if isinstance(batch, BaseException):
                return
