"""What all ranks have to know of a step, as numbers that one all-reduce adds up."""

import math
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.resilience.wishes import Wishes

# A float32 counts to 2**24 only: target tokens travel as two numbers.
LOW_BITS = 12
LARGEST = torch.finfo(torch.float32).max


class Count(NamedTuple):
    """Of the global batch: how many positions have a target, and whether the data has ended on every rank."""

    target_tokens: int
    ended: bool


def targets_of(batch: Batch) -> list[float]:
    """How many positions of `batch` have a target, as the two numbers that `in_all` reads."""
    targets = int((batch.targets != IGNORE).sum())
    return [float(targets >> LOW_BITS), float(targets & ((1 << LOW_BITS) - 1))]


def in_all(high: float, low: float) -> int:
    """The count whose two numbers are these; they may have been added up."""
    return (int(high) << LOW_BITS) + int(low)


def count(batch: Batch, ranks: Ranks) -> list[float]:
    """The rank's share of the numbers that `counted` reads; of ranks with the same sequences one has them."""
    return [*targets_of(batch), float(not batch.ended)] if ranks.reads else [0.0, 0.0, 0.0]


def counted(high: float, low: float, going: float) -> Count:
    """From the sums over all ranks."""
    return Count(in_all(high, low), going == 0)


class Facts(NamedTuple):
    """A step's numbers over all ranks, on the device until they are read.

    following: counts the next batch. wished: what the ranks ask of all. measured: what the model says besides.
    """

    loss: Tensor
    grad_norm: Tensor
    param_norm: Tensor
    following: Tensor
    wished: Tensor
    measured: Tensor

    def read(self, wishes: Wishes) -> tuple[float, float, float, Count, list[float]]:
        """As Python numbers: the step's one wait for the device. What is agreed on goes into `wishes`."""
        parts = torch.stack(self[:3]), self.following, self.wished, self.measured
        numbers = iter(torch.cat(parts).tolist())
        norms, following, wished, measured = (list(islice(numbers, len(part))) for part in parts)
        wishes.agree(*wished)
        loss, grad_norm, param_norm = norms
        return loss, grad_norm, param_norm, counted(*following), measured


def add_up(shares: Tensor, counts: list[float], ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Sums over all ranks, on the device, in one all-reduce: of numbers that should be finite, and of counts.

    shares: (n,) float32, this rank's. Where a rank's isn't finite, or is too large for the sum to be, the
    sum is NaN. Ranks tell of that apart: an accelerator's sum may make a finite number of infinity.
    """
    sound = shares.abs() <= LARGEST / ranks.size  # a NaN isn't
    sent = torch.where(sound, shares, 0.0), (~sound).float(), shares.new_tensor(counts)
    total, unsound, counts_of_all = ranks.sum(torch.cat(sent)).split([len(part) for part in sent])
    return torch.where(unsound > 0, math.nan, total), counts_of_all


def agree(
    loss: Tensor, squares: Tensor, measured: Tensor, following: Batch, wishes: Wishes, ranks: Ranks
) -> Facts:
    """The step's one small all-reduce. It also counts the batch that comes next, so that no step needs two.

    loss: this rank's share of the step's mean loss. squares: of the sums of squares of gradients and weights.
    measured: (m,), of other means.
    """
    counts = [*count(following, ranks), *wishes.numbers()]
    total, others = add_up(torch.cat((loss.reshape(1), squares, measured)), counts, ranks)
    norms = total[1:3].sqrt()
    return Facts(total[0], norms[0], norms[1], others[:3], others[3:], total[3:])


def count_all(batch: Batch, ranks: Ranks, device: torch.device) -> Count:
    """The count of a batch alone, for the first one and after one that isn't a step."""
    return counted(*ranks.sum(torch.tensor(count(batch, ranks), device=device)).tolist())
