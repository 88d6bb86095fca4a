"""The seam between the loop and how a step is computed."""

from typing import Any, Protocol

from torch import Tensor

from trainwright.trainers.data.batch import Batch


class Stepper(Protocol):
    """One optimizer step in three calls; the loop never calls `backward` itself.

    Losses and gradients are sums over the global batch's target tokens divided by their count, which is
    known before the first backward: so nothing divides by a number of ranks or micro-batches.
    """

    def forward_backward(self, batch: Batch, target_tokens: int) -> Tensor:
        """Gradients of this rank's sequences; returns the sum of their losses in nats, a scalar."""

    def grad_norm(self) -> Tensor:
        """The L2 norm of all gradients of the step, over all ranks."""

    def param_norm(self) -> Tensor:
        """The L2 norm of all parameters, over all ranks."""

    def update(self, lr: float, clip: float | None, skip: bool = False) -> None:
        """Clip the gradients to norm `clip`, update the weights, drop the gradients; `skip`: only drop."""

    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of the losses of this rank's sequences in nats, without gradients."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors by name."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of `state_dict`, in place."""
