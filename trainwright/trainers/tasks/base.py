"""What differs between jobs: the model, what a batch is, how the loss is made."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from trainwright.models.plan import Plan, Units
from trainwright.models.storage import Piece
from trainwright.trainers.checkpoint.place import Place
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.platform.base import Platform


class Task(Protocol):
    """One kind of job; the loop and the steppers are the same for all.

    All ranks call every method but `sample`, which rank 0 calls, and in the same order: some communicate.
    """

    def build_model(self, platform: Platform, layers: range | None = None) -> nn.Module:
        """The model, fp32, on the meta device: its parameters have shapes and no memory.

        layers: only the part of it that has these, for a stage of a pipeline.
        """

    def plan(self) -> tuple[Plan, Units]:
        """How the model is cut by tensor parallelism, and what data-parallel ranks gather together."""

    def fill(self, pieces: Mapping[str, Piece]) -> None:
        """Write the initial (or pretrained) values into this rank's parts of the model."""

    def open_stream(self, cursor: np.ndarray | None) -> AbstractContextManager[Iterator[Batch]]:
        """The rank's training batches, from the start or from a checkpoint's whole cursor."""

    def open_validation(self) -> list[Batch] | None:
        """The rank's validation batches, the same each time; None where nothing is held out."""

    def loss(self, model: nn.Module, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """The sum of the losses of a micro-batch's target tokens, in nats, a scalar.

        Of a part of the model that isn't the last: what the part after it needs, which gets it as `hidden`.
        """

    def sample(self, checkpoint: Place) -> dict[str, Any] | None:
        """Something that shows a person what the model has learnt: the fields of a `sample` event."""

    def total_steps(self) -> int | None:
        """The step at which the schedule ends; None where nothing says."""
