"""The bytes of tensors by kind, while they are there."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from trainwright.models.cross_entropy import linear_cross_entropy
from trainwright.trainers.plan.memory_tracker import MemoryTracker


def total(kinds: dict[str, int]) -> int:
    return sum(kinds.values())


def test_what_is_there_and_the_most_that_was():
    with MemoryTracker("gradients") as tracker:
        first = torch.zeros(1000)
        second = first * 2
        view = second[10:]
        del second
        assert tracker.now()["activations"] == 8000
        del first
        assert total(tracker.now()) == 4000
        assert total(tracker.peak()) == 8000
        tracker.begin()
        assert total(tracker.peak()) == 4000
        del view
        assert total(tracker.now()) == 0


def test_storages_that_grow_and_shrink():
    with MemoryTracker("gradients") as tracker:
        made = torch.empty(1000)
        made.untyped_storage().resize_(0)
        assert total(tracker.now()) == 0
        made.untyped_storage().resize_(4000)
        assert total(tracker.now()) == 4000


def test_tensors_without_values_count_as_much():
    with FakeTensorMode(), MemoryTracker("gradients") as tracker:
        made = torch.empty(10**12, dtype=torch.bfloat16)
        assert total(tracker.now()) == 2 * 10**12
        made.untyped_storage().resize_(0)
        assert total(tracker.now()) == 0
        del made


def test_kinds_are_told_by_who_makes_them():
    weight = torch.randn(300, 20, requires_grad=True)
    hidden = torch.randn(40, 20, requires_grad=True)
    with MemoryTracker("gathered") as tracker:
        tracker.assign("weights", [weight])
        loss = linear_cross_entropy(hidden, weight, torch.zeros(40, dtype=torch.int64))
        assert tracker.now()["weights"] == 4 * 300 * 20
        assert tracker.now()["gathered"] == 4 * 300 * 20  # the weight's gradient
        assert 2 * 4 * 40 * 300 <= tracker.peak()["logits"] < 2.2 * 4 * 40 * 300
        loss.backward()
        del loss
        assert tracker.now()["gathered"] == 4 * 300 * 20 + 4 * 40 * 20  # the other parameter's too


def test_a_gradient_that_autograd_keeps():
    weight = torch.randn(300, 20, requires_grad=True)
    with MemoryTracker("gathered") as tracker:
        (weight * weight).sum().backward()
        assert tracker.now()["gathered"] == 4 * 300 * 20
        weight.register_post_accumulate_grad_hook(tracker.take_gradient)
        (weight * weight).sum().backward()
        assert tracker.now()["gradients"] == 4 * 300 * 20
        assert tracker.now()["gathered"] == 0


def test_weights_stay_weights_where_activations_are_made_again():
    weight = torch.randn(300, 20, requires_grad=True)
    hidden = torch.randn(40, 20, requires_grad=True)
    with MemoryTracker("gradients") as tracker:
        tracker.assign("weights", [weight])
        checkpoint(lambda x: (x @ weight.T).sum(), hidden, use_reentrant=False).backward()
        assert tracker.now()["weights"] == 4 * 300 * 20
