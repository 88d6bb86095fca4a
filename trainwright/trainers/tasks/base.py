"""What differs between jobs: the model, what a batch is, how the loss is made."""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.stream import Stream
from trainwright.trainers.platform.base import Platform


class Task(Protocol):
    """One kind of job; the loop and the steppers are the same for all."""

    def build_model(self, platform: Platform) -> nn.Module:
        """The model on the platform's device, with its initial (or pretrained) fp32 weights."""

    def open_stream(self, cursor: np.ndarray | None) -> Stream:
        """The training batches, from the start or from a checkpoint's cursor."""

    def open_validation(self) -> list[Batch] | None:
        """The validation batches, the same each time; None where nothing is held out."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the losses of a micro-batch's target tokens, in nats, a scalar."""

    def sample(self, model: nn.Module, device: torch.device) -> dict[str, Any] | None:
        """Something that shows a person what the model has learnt: the fields of a `sample` event."""

    def total_steps(self) -> int | None:
        """The step at which the schedule ends; None where nothing says."""
