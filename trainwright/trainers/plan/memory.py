"""The memory that a rank of a run needs on its device, by kind."""

from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes of one rank at the moment of a step when they are the most together.

    weights: the rank's own part, with fp32 masters where they are kept apart from what the model computes with.
    gathered: whole weights that FSDP has made of the ranks' parts, and what it gathers and reduces them in.
    gradients: the rank's own part of them, also as they are added up over micro-batches.
    optimizer: the moments. activations: what the forward pass keeps for the backward pass, and what both work
    on, the batch included. logits: what the head works on, of the vocabulary's size.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self)
