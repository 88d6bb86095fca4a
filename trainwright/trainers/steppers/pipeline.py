"""The stepper of a pipeline: micro-batches go through stages on several ranks, by a schedule of PyTorch's.

The schedules are those of torch.distributed.pipelining (1F1B, arXiv 2104.04473; zero bubble, arXiv 2401.10241).
They order the work and send what goes between stages; losses and gradients stay the sums of `Stepper`, and FSDP
stays `Layout`'s.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from trainwright.configs.degrees import stages_per_rank
from trainwright.configs.schema import Recipe
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.parallel.apply import Layout
from trainwright.trainers.parallel.deferred import Deferred
from trainwright.trainers.parallel.stages import Stages, stages_of_rank
from trainwright.trainers.precision import PRECISIONS
from trainwright.trainers.steppers.updating import Updating

# (part of the model, micro-batch, what the part before has made of it) to what the part makes of it.
PartLoss = Callable[[nn.Module, Batch, Tensor | None], Tensor]

SCHEDULES: dict[str, Callable[..., Any]] = {
    "1f1b": lambda stages, count, **options: Schedule1F1B(stages[0], count, **options),
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class PipelineStepper(Updating):
    """A rank's stages of all micro-batches, and their update; implements `Stepper`.

    loss: the task's; of the last part of the model it is the sum of a micro-batch's losses.
    """

    def __init__(
        self, model: Stages, loss: PartLoss, recipe: Recipe, layout: Layout, device: torch.device
    ) -> None:
        super().__init__(model, recipe, layout, device)
        ranks, parallel = layout.ranks, recipe.parallel
        assert ranks.mesh is not None
        self.group = ranks.mesh["pp"].get_group()
        self.ranks = ranks.degrees.pp
        self.stages = stages_of_rank(ranks.pp_rank, self.ranks, stages_per_rank(parallel))
        self.last = self.ranks * len(self.stages) - 1
        self.parts = [_Part(part, loss) for part in model]
        self.kind = parallel.pp_schedule
        # By stage: where the schedule says when weights' gradients are made, what was put off until then.
        defers = self.kind == "zero_bubble"
        self.deferred = [Deferred(part).take if defers else None for part in model]
        self.micro_batch_size = recipe.train.micro_batch_size
        self.width = recipe.model.hidden_size
        self.cut = ranks.degrees.tp if parallel.sp is not False else 1  # of each sequence's positions
        self.computes_in = PRECISIONS[recipe.precision.mode].computes_in
        self._schedule: Any = None
        self._scheduled = 0  # the micro-batches that it is for
        self._target_tokens = 0
        self._total = torch.zeros((), device=device)

    def forward_backward(self, batch: Batch, target_tokens: int) -> Tensor:
        """See `Stepper`."""
        micro_batches = self._micro_batches(batch)
        if self._scheduled != len(micro_batches):  # of a run every step has as many
            self._schedule, self._scheduled = self._build(micro_batches), len(micro_batches)
        for part in self.parts:
            part.micro_batches = micro_batches
        self._target_tokens, self._total = target_tokens, torch.zeros((), device=self.device)
        numbers = torch.arange(len(micro_batches))
        self._schedule.step(number=numbers, target=numbers, return_outputs=False)
        self.collect_gradients()
        return self._share(self._total)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """See `Stepper`. Without a backward there is nothing to schedule."""
        total = torch.zeros((), device=self.device)
        for micro_batch in self._micro_batches(batch):
            for stage, part in zip(self.stages, self.parts, strict=True):
                hidden = None
                if stage > 0:
                    hidden = self._hidden(micro_batch, self.device)
                    dist.recv(hidden, group=self.group, group_src=(stage - 1) % self.ranks)
                made = part.loss(part.model, micro_batch, hidden)
                if stage == self.last:
                    total += made
                else:
                    dist.send(made.contiguous(), group=self.group, group_dst=(stage + 1) % self.ranks)
        return self._share(total)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """All of one size, for what is sent has one: blank rows, of any word, fill the last one up."""
        rows = len(batch.tokens)
        size = min(self.micro_batch_size, rows)
        count = math.ceil(rows / size)
        full = batch.filled_up(count * size, eos=0).to(self.device)
        return [full.sequences(start, start + size) for start in range(0, count * size, size)]

    def _hidden(self, micro_batch: Batch, device: torch.device) -> Tensor:
        """Memory for what goes from stage to stage of a micro-batch."""
        rows, length = micro_batch.tokens.shape
        return torch.empty(rows, length // self.cut, self.width, dtype=self.computes_in, device=device)

    def _build(self, micro_batches: list[Batch]) -> Any:
        hidden = self._hidden(micro_batches[0], torch.device("meta")).requires_grad_()
        stages = [
            _Stage(part, stage, self.last + 1, hidden, self.device, self.group, self.layout, deferred)
            for stage, part, deferred in zip(self.stages, self.parts, self.deferred, strict=True)
        ]
        # Sums, never means: losses are already parts of the global batch's mean.
        options = {"loss_fn": self._part_of_mean, "scale_grads": False}
        return SCHEDULES[self.kind](stages, len(micro_batches), **options)

    def _part_of_mean(self, loss: Tensor, number: Tensor) -> Tensor:
        """Of a micro-batch's loss the part of the global batch's mean, which goes backward."""
        self._total += loss.detach()
        return loss / self._target_tokens

    def _share(self, loss: Tensor) -> Tensor:
        """The last stage's ranks have a loss; of tensor-parallel peers, which all have it, one brings it in.

        Whoever has a NaN brings it in too.
        """
        return loss if self.layout.ranks.tp_rank == 0 else loss * 0.0


class _Part(nn.Module):
    """A part of the model as a schedule calls it, with a micro-batch's number instead of its tensors.

    It stands before FSDP: a schedule that saw it would gather and reduce by its own ideas.
    """

    def __init__(self, model: nn.Module, loss: PartLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.micro_batches: list[Batch] = []

    def forward(self, *hidden: Tensor, number: Tensor) -> Tensor:
        """`number`: (1,), on the CPU."""
        return self.loss(self.model, self.micro_batches[int(number)], hidden[0] if hidden else None)


class _Stage(PipelineStage):
    """A stage that says to FSDP, before each backward, which of its communication is due.

    hidden: as it goes from stage to stage, on the meta device. take_deferred: `Deferred.take`.
    """

    def __init__(
        self,
        part: _Part,
        number: int,
        count: int,
        hidden: Tensor,
        device: torch.device,
        group: dist.ProcessGroup,
        layout: Layout,
        take_deferred: Callable[[], Callable[[], None]] | None,
    ) -> None:
        loss = torch.empty((), device="meta", requires_grad=True)
        super().__init__(
            part,
            number,
            count,
            device,
            input_args=hidden if number > 0 else (),
            output_args=hidden if number < count - 1 else loss,
            group=group,
            dw_builder=take_deferred,
        )
        self.part, self.layout = part, layout

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """A micro-batch's backward through the stage; see `PipelineStage`."""
        self.layout.before_backward(self.part.model, last_backward)
        return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Make what a micro-batch's backward has put off; see `PipelineStage`."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.layout.after_deferred(self.part.model, last_backward)
