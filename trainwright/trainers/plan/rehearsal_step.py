"""Steps of a recipe with their memory and their collectives watched: the run's own code on a blank batch.

It serves a rehearsal, on tensors without values, and what a rehearsal is held against, on a device.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainwright.configs.schema import Recipe
from trainwright.models.attention import Flex
from trainwright.models.llama import Llama
from trainwright.trainers.bf16_adamw import Bf16AdamW
from trainwright.trainers.build import lay_out_model, stepper_of
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.data.cursor import new_cursor
from trainwright.trainers.data.dealing import owned_lanes
from trainwright.trainers.data.peers import give
from trainwright.trainers.facts import agree
from trainwright.trainers.parallel.counting import CountCollectives, Counts
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.parallel.shards import local, local_pieces, materialise
from trainwright.trainers.plan.memory_tracker import ByKind, MemoryTracker
from trainwright.trainers.platform.base import Platform
from trainwright.trainers.resilience.wishes import Wishes
from trainwright.trainers.steppers.updating import Updating
from trainwright.trainers.tasks.pretrain import Pretraining


class Watched(NamedTuple):
    """The last of some steps.

    by_moment: bytes by kind when they are the most together in each part of the step. collectives: of the
    step, of this rank. before: those of the step before.
    """

    by_moment: dict[str, ByKind]
    collectives: Counts
    before: Counts


class Fused:
    """What stands for `Flex`, which has to be compiled: it keeps the same for the backward pass."""

    def mask(self, documents: Tensor) -> None:
        """A mask of blocks is next to nothing."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        few = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=few)


class Blank(Pretraining):
    """Pretraining without a tokenizer or data; on tensors without values, also without compiled attention."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        self.recipe = recipe
        self.ranks = ranks

    def build_model(self, platform: Platform, layers: range | None = None) -> nn.Module:
        """See `Task`."""
        model = super().build_model(platform, layers)
        assert isinstance(model, Llama)
        if isinstance(model.kernel, Flex):
            model.kernel = Fused()
            for layer in model.layers:
                layer.get_submodule("self_attn").kernel = model.kernel  # type: ignore[assignment]
        return model

    def batch(self, rows: int) -> Batch:
        """A batch of `rows` sequences, in which every position has a target."""
        data, seq_len = self.recipe.data, self.recipe.train.seq_len
        lanes = data.lanes or self.recipe.train.global_batch_size
        own = owned_lanes(lanes, self.ranks.data_rank, self.ranks.data_ranks)
        words = torch.zeros(rows, seq_len, dtype=torch.int64)
        documents = torch.zeros(rows, seq_len, dtype=torch.int32)
        return Batch(words, words.clone(), documents, new_cursor(len(own), len(data.mix) or 1), epoch=0.0)


def watch_steps(
    task: Blank,
    platform: Platform,
    steps: Sequence[int],
    modes: Sequence[AbstractContextManager[object]] = (),
) -> Watched:
    """Build the task's model on its ranks, and take a step on each of so many sequences of a rank.

    modes: within which the weights come to be and the steps are taken; without them both are real.
    """
    recipe, ranks = task.recipe, task.ranks
    model, layout, _ = lay_out_model(recipe, task, ranks, platform)
    local_pieces(model)  # finds out where they start, which tensors without values can't tell
    counting = CountCollectives(ranks.degrees)
    tracker = MemoryTracker("gathered" if ranks.degrees.data > 1 else "gradients")
    with ExitStack() as stack:
        for mode in (*modes, counting, tracker):
            stack.enter_context(mode)
        materialise(model, platform.device)
        if layout.keeps_masters:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(tracker.take_gradient)
        if not modes:
            task.fill(local_pieces(model))
        stepper = stepper_of(model, layout, recipe, task, platform.device)
        assert isinstance(stepper, Updating)
        if isinstance(stepper.optimizer, Bf16AdamW):
            stepper.optimizer.compiles = False  # within a mode nothing is: it would run uncompiled, all at once
        _assign_what_stays(tracker, model, stepper)
        between = tracker.now()
        given = _given(task, steps)
        next(given)
        counts = [counting.counts()]
        for rows in steps:
            gc.collect()
            batch = task.batch(rows)
            tracker.begin()
            loss = stepper.forward_backward(batch, batch.tokens.numel())
            backward = tracker.peak()
            upcoming = next(given)  # as the loop does
            tracker.begin()
            facts = agree(loss, stepper.squares(), loss.new_tensor([]), upcoming, Wishes(), ranks)
            norms = tracker.peak()
            tracker.begin()
            stepper.update(recipe.optim.lr, facts.grad_norm, recipe.optim.clip)
            update = tracker.peak()
            counts.append(counting.counts())
    moments = {"between steps": between, "forward and backward": backward, "norms": norms, "update": update}
    return Watched(moments, difference(counts[-1], counts[-2]), difference(counts[-2], counts[-3]))


def _given(task: Blank, steps: Sequence[int]) -> Iterator[Batch]:
    """A batch before the steps, and in each one as large as its own."""
    batches = (task.batch(rows) for rows in (steps[0], *steps))
    peers = task.ranks.peers
    return batches if peers is None else give(batches, peers)


def _assign_what_stays(tracker: MemoryTracker, model: nn.Module, stepper: Updating) -> None:
    weights = (*model.parameters(), *stepper.weights.stored.values())
    tracker.assign("weights", map(local, weights))
    tracker.assign(
        "optimizer", (value for state in stepper.optimizer.state.values() for value in state.values())
    )


def difference(after: Counts, before: Counts) -> Counts:
    """What was sent between two counts."""
    none = 0, 0
    changed = {
        key: (calls - before.get(key, none)[0], sent - before.get(key, none)[1])
        for key, (calls, sent) in after.items()
    }
    return {key: count for key, count in changed.items() if count != none}
