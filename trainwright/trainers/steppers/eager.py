"""The stepper of plain PyTorch: micro-batches one after another, their gradients added up."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainwright.configs.schema import Recipe
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.parallel.apply import Layout
from trainwright.trainers.steppers.updating import Updating

Loss = Callable[[nn.Module, Batch], Tensor]


class EagerStepper(Updating):
    """One rank's forward, backward and update; implements `Stepper`.

    loss: (model, micro-batch) to the sum of its target tokens' losses, the task's part of a step.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, recipe: Recipe, layout: Layout, device: torch.device
    ) -> None:
        super().__init__(model, recipe, layout, device)
        self.model = model
        self.loss = loss
        self.micro_batch_size = recipe.train.micro_batch_size

    def forward_backward(self, batch: Batch, target_tokens: int) -> Tensor:
        """See `Stepper`."""
        total = torch.zeros((), device=self.device)
        micro_batches = self._micro_batches(batch)
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.layout.before_backward(self.model, last=number == len(micro_batches))
            loss = self.loss(self.model, micro_batch.to(self.device))
            (loss / target_tokens).backward()
            total += loss.detach()
        self.collect_gradients()
        return self._share(total)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See `Stepper`."""
        total = torch.zeros((), device=self.device)
        for micro_batch in self._micro_batches(batch):
            total += self.loss(self.model, micro_batch.to(self.device))
        return self._share(total)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self.micro_batch_size
        return [batch.sequences(start, start + size) for start in range(0, len(batch.tokens), size)]

    def _share(self, loss: Tensor) -> Tensor:
        """Tensor-parallel peers all have the loss of their sequences: one brings it in.

        Whoever has a NaN brings it in too.
        """
        return loss if self.layout.ranks.tp_rank == 0 else loss * 0.0
