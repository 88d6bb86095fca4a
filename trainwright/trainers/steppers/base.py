"""The seam between the loop and how a step is computed."""

from typing import Any, Protocol

from torch import Tensor

from trainwright.trainers.data.batch import Batch


class Stepper(Protocol):
    """One optimizer step in a few calls; the loop never calls `backward` itself.

    Losses and gradients are sums over the global batch's target tokens divided by their count, which is
    known before the first backward: so nothing divides by a number of ranks or micro-batches.
    """

    def forward_backward(self, batch: Batch, target_tokens: int) -> Tensor:
        """Gradients of this rank's sequences; returns its share of the sum of all losses in nats, a scalar.

        target_tokens: those of the whole global batch.
        """

    def squares(self) -> Tensor:
        """The rank's share of the sums of squares of all gradients and of all weights, (2,) float32.

        Summed over the ranks they are the squared L2 norms: what several ranks have, one counts.
        """

    def measured(self) -> dict[str, Tensor]:
        """What the model says of the step's passes besides the loss, for metrics, by name; asked once a step.

        The rank's share of sums over the target tokens, scalars; the names are the same on all ranks.
        """

    def update(self, lr: float, grad_norm: Tensor, clip: float | None, skip: bool = False) -> None:
        """Clip the gradients to norm `clip`, update the weights, drop the gradients; `skip`: only drop.

        grad_norm: of all gradients over all ranks.
        """

    def evaluate(self, batch: Batch) -> Tensor:
        """The rank's share of the sum of the losses in nats, without gradients."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors by name; DTensors where ranks share one."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of `state_dict`, in place."""
