"""What all ranks have to know of a step, as numbers that one all-reduce adds up."""

from typing import NamedTuple

import torch
from torch import Tensor

from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.resilience.wishes import Wishes

# A float32 counts to 2**24 only: target tokens travel as two numbers.
LOW_BITS = 12


class Count(NamedTuple):
    """Of the global batch: how many positions have a target, and whether the data has ended on every rank."""

    target_tokens: int
    ended: bool


def count(batch: Batch, ranks: Ranks) -> list[float]:
    """The rank's share of the numbers that `counted` reads; of ranks with the same sequences one has them."""
    if not ranks.reads:
        return [0.0, 0.0, 0.0]
    targets = int((batch.targets != IGNORE).sum())
    return [float(targets >> LOW_BITS), float(targets & ((1 << LOW_BITS) - 1)), float(not batch.ended)]


def counted(high: float, low: float, going: float) -> Count:
    """From the sums over all ranks."""
    return Count((int(high) << LOW_BITS) + int(low), going == 0)


class Facts(NamedTuple):
    """A step's numbers over all ranks, on the device until they are read.

    following: counts the next batch. wished: what the ranks ask of all.
    """

    loss: Tensor
    grad_norm: Tensor
    param_norm: Tensor
    following: Tensor
    wished: Tensor

    def read(self, wishes: Wishes) -> tuple[float, float, float, Count]:
        """As Python numbers: the step's one wait for the device. What is agreed on goes into `wishes`."""
        numbers = torch.cat((torch.stack(self[:3]), self.following, self.wished)).tolist()
        loss, grad_norm, param_norm, *others = numbers
        wishes.agree(*others[3:])
        return loss, grad_norm, param_norm, counted(*others[:3])


def agree(loss: Tensor, squares: Tensor, following: Batch, wishes: Wishes, ranks: Ranks) -> Facts:
    """The step's one small all-reduce. It also counts the batch that comes next, so that no step needs two.

    loss: this rank's share of the step's mean loss. squares: of the sums of squares of gradients and weights.
    """
    others = loss.new_tensor([*count(following, ranks), *wishes.numbers()])
    total = ranks.sum(torch.cat((loss.reshape(1), squares, others)))
    norms = total[1:3].sqrt()
    return Facts(total[0], norms[0], norms[1], total[3:6], total[6:])


def count_all(batch: Batch, ranks: Ranks, device: torch.device) -> Count:
    """The count of a batch alone, for the first one and after one that isn't a step."""
    return counted(*ranks.sum(torch.tensor(count(batch, ranks), device=device)).tolist())
