import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.trainers.tiny import tiny_batch
from trainwright.trainers.data.batch import IGNORE
from trainwright.trainers.facts import LARGEST, add_up, agree, in_all, targets_of
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.resilience.wishes import Wishes


@dataclass(frozen=True)
class Two(Ranks):
    """Two ranks, of which the other brings `other`, on a device whose sum makes finite numbers of all."""

    size: int = 2
    other: tuple[float, ...] = ()

    def sum(self, numbers: Tensor) -> Tensor:
        return numbers.add_(torch.tensor(self.other)).nan_to_num_(nan=0.0)


@pytest.mark.parametrize("share", [math.inf, -math.inf, math.nan, 0.9 * LARGEST])
def test_what_is_not_finite_is_nan_on_all_ranks_whatever_the_device_makes_of_it(share: float):
    here = Two(other=(1.0, 2.0, 0.0, 0.0, 5.0))
    total, counts = add_up(torch.tensor([share, 3.0]), [6.0], here)
    assert total[0].isnan()
    assert (float(total[1]), float(counts)) == (5.0, 11.0)
    there = Two(other=(0.0, 2.0, 1.0, 0.0, 5.0))  # as the rank with such a share sends it
    total, _ = add_up(torch.tensor([1.0, 3.0]), [6.0], there)
    assert total[0].isnan()
    assert float(total[1]) == 5.0


def test_a_steps_facts_are_read_as_they_were_brought():
    batch, wishes = tiny_batch(), Wishes()
    measured = torch.tensor([0.5, 0.25])
    facts = agree(torch.tensor(2.5), torch.tensor([9.0, 16.0]), measured, batch, wishes, Ranks())
    targets = int((batch.targets != IGNORE).sum())
    assert facts.read(wishes) == (2.5, 3.0, 4.0, (targets, False), [0.5, 0.25])


def test_targets_are_counted_beyond_what_a_float_counts_to():
    batch = tiny_batch()
    high, low = targets_of(batch)
    assert in_all(high + 2**20, low + 4095) == 2**32 + 4095 + int((batch.targets != IGNORE).sum())
