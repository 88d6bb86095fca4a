"""Batches that do harm, in runs that are real otherwise."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.cursor import GIVEN
from trainwright.trainers.steppers.eager import EagerStepper


@contextmanager
def poisoned(factors: Mapping[int, float]) -> Iterator[list[int]]:
    """Within the body the batches with these numbers have their loss multiplied, and so their gradients.

    Gives the numbers of the batches that were trained on, by one process, in order; a stream's first is 1.
    Each lane gives a sequence to each batch.
    """
    compute, trained = EagerStepper.forward_backward, []

    def forward_backward(stepper: EagerStepper, batch: Batch, target_tokens: int) -> Tensor:
        number = int(batch.cursor[0, GIVEN])
        trained.append(number)
        loss, factor = stepper.loss, factors.get(number, 1.0)
        stepper.loss = lambda model, part: factor * loss(model, part)
        try:
            return compute(stepper, batch, target_tokens)
        finally:
            stepper.loss = loss

    EagerStepper.forward_backward = forward_backward
    try:
        yield trained
    finally:
        EagerStepper.forward_backward = compute
