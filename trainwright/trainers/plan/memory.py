"""The memory that a rank of a run needs on its device, by kind: from the recipe alone, nothing is allocated.

A step is played through in the order of the rank's work, unit by unit, with the bytes that each pass takes and
gives back: weights and their gathers as FSDP2 makes them, gradients by the precision's rules (`precision.py`),
activations as `activations.py` has them. Of the many micro-batches of a rank without a pipeline the first ones
and the last are played: the others are like the second.

What it leaves out: what the allocator, the compiler and the communication library take for themselves, values
of a few numbers a position, and data that waits on the host.
"""

from typing import NamedTuple

from trainwright.configs.degrees import Degrees
from trainwright.configs.schema import Recipe
from trainwright.trainers.parallel.stages import layers_of_rank
from trainwright.trainers.parallel.traffic import micro_batches, work_of_rank
from trainwright.trainers.plan.activations import (
    FP32,
    attention_kernel,
    head_memory,
    layer_memory,
    planned_platform,
    widths,
)
from trainwright.trainers.plan.shapes import EMBEDDING, HEAD, LAYER, Unit, units_of_layers
from trainwright.trainers.platform.choose import PLATFORMS
from trainwright.trainers.precision import PRECISIONS, REDUCES

BATCH = 8 + 8 + 4  # bytes of a position: its token and target as int64, its document as int32


class Memory(NamedTuple):
    """Bytes of one rank at the moment of a step when they are the most together.

    weights: the rank's own part, with fp32 masters where they are kept apart from what the model computes with.
    gathered: whole weights that FSDP has made of the ranks' parts, their gradients before they are reduced, and
    what both are gathered and reduced in. gradients: the rank's own part of them, also as they are added up.
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


def memory_of(recipe: Recipe, degrees: Degrees, pp_rank: int = 0) -> Memory:
    """What a step of `recipe` needs on a rank at this place of the pipeline, on a mesh of `degrees`."""
    step = _Step(recipe, degrees, pp_rank)
    work = work_of_rank(recipe, degrees, pp_rank)
    if degrees.pp == 1:
        work = work[:4] + work[-2:] if len(work) > 6 else work
    backward_left = [sum(one == (stage, "B") for one in work) for stage in range(len(step.stages))]
    for stage, kind in work:
        if kind == "F":
            step.forward(step.stages[stage])
        else:
            backward_left[stage] -= 1
            step.backward(step.stages[stage], last=not backward_left[stage])
    return step.most


class _Stage:
    """A part of the model. here: of each unit, whether its weights are gathered. backwards: that were done."""

    def __init__(self, units: list[Unit], begins: bool, ends: bool) -> None:
        self.units, self.begins, self.ends = units, begins, ends
        self.here = [False] * len(units)
        self.backwards = 0


class _Step:
    """What a rank holds while it steps.

    most: when it was the most. buffer: the gather's that isn't copied out yet. whole: gradients of weights as
    the model computes with them. reducing: the last reduction's input. reduced: what has been all-reduced in
    another dtype than the gradients'.
    """

    def __init__(self, recipe: Recipe, degrees: Degrees, pp_rank: int) -> None:
        precision, parallel = PRECISIONS[recipe.precision.mode], recipe.parallel
        self.element, self.kept_in = precision.computes_in.itemsize, precision.kept_in.itemsize
        self.sums_in = REDUCES[recipe.precision.reduce].itemsize
        self.zero, self.shards, self.replicas = parallel.zero, degrees.dp_shard, degrees.dp_replicate
        self.shares = degrees.data > 1
        self.direct = PLATFORMS[planned_platform(recipe)].sends_directly
        self.defers = degrees.pp > 1 and parallel.pp_schedule == "zero_bubble"
        on = self.on = widths(recipe, degrees)
        self.layer, self.head = layer_memory(recipe, on), head_memory(on, degrees.tp)
        layers = recipe.model.num_hidden_layers
        dealt = layers_of_rank(recipe, pp_rank, degrees.pp) if degrees.pp > 1 else [range(layers)]
        self.stages = [
            _Stage(units_of_layers(recipe.model, own, degrees.tp), own.start == 0, own.stop == layers)
            for own in dealt
        ]
        self.padded = {unit.kind: unit.padded(self.shards) for stage in self.stages for unit in stage.units}
        self.buffer = self.reducing = self.reduced = 0
        # With a zero bubble so many micro-batches wait for their weights' gradients: one more on each rank.
        self.puts_off, self.deferred = pp_rank, list[int]()
        self.weights, self.optimizer = self._state()
        self.gathered = self.whole = self.gradients = 0
        self.activations = self._batch(recipe, degrees)
        self.most = Memory(self.weights, 0, 0, self.optimizer, self.activations, 0)

    def _state(self) -> tuple[int, int]:
        units = [unit for stage in self.stages for unit in stage.units]
        own = sum(self.padded[unit.kind] // self.shards for unit in units)
        # In one process mixed precision has the masters beside the weights that it computes with.
        copies = self.element if self.element < self.kept_in and not self.shares else 0
        return own * (self.kept_in + copies), own * 2 * self.kept_in

    def _batch(self, recipe: Recipe, degrees: Degrees) -> int:
        """The batch, what keeps documents apart, rotary tables, and what a pipeline receives in a step."""
        count, on = len(micro_batches(recipe, degrees)), self.on
        whole = degrees.pp > 1 or PLATFORMS[planned_platform(recipe)].is_the_host
        positions = on.positions * (count if whole else 1)
        tables = 2 * on.length * on.head * on.element
        received = sum(not stage.begins for stage in self.stages) + sum(not stage.ends for stage in self.stages)
        mask = attention_kernel(recipe, on).mask
        return BATCH * positions + tables + mask + count * received * on.residual

    def _look(self, gathered: int = 0, whole: int = 0, activations: int = 0, logits: int = 0) -> None:
        """See whether it is the most yet, with what is there for a moment besides."""
        whole += self.whole
        gathered += self.gathered + self.buffer + self.reducing + self.reduced + (whole if self.shares else 0)
        gradients = self.gradients + (0 if self.shares else whole)
        activations += self.activations
        total = self.weights + gathered + gradients + self.optimizer + activations + logits
        if total > self.most.total:
            self.most = Memory(self.weights, gathered, gradients, self.optimizer, activations, logits)

    def forward(self, stage: _Stage) -> None:
        """A micro-batch's forward pass."""
        for index, unit in enumerate(stage.units):
            self._gather(stage, index)
            if unit.kind == LAYER:
                self.activations += self._kept(stage, index)
            elif unit.kind == HEAD:
                activations, whole, logits = self.head.work
                self._look(whole=whole, activations=activations, logits=logits)
                self.activations += self.head.kept
                self.whole += self.head.gradient
            if self.zero == 3 and unit.kind != HEAD:
                self._drop(stage, index)
        self.buffer = 0
        if not stage.ends:
            self.activations += self.on.residual  # its result, which is sent on
        self._look()

    def backward(self, stage: _Stage, last: bool) -> None:
        """A micro-batch's backward pass; `last`: of the step."""
        deferred = 0
        if not stage.ends:
            self.activations -= self.on.residual
        for index in reversed(range(len(stage.units))):
            unit = stage.units[index]
            if unit.kind != EMBEDDING:
                self._gather(stage, index, ahead=self.buffer > 0)
                self.buffer = 0  # copied out, and freed at once
                if self.zero >= 2 and index and not stage.here[index - 1]:
                    self._prefetch(stage, index - 1)
            if unit.kind == LAYER:
                self.activations += self.layer.again
                self._look(activations=self.layer.work, whole=self.element * unit.largest)
                put_off = self.layer.deferred if self.defers else 0
                self.activations += put_off - self.layer.again - self._kept(stage, index)
                deferred += put_off
            elif unit.kind == HEAD:
                self._look(whole=self.element * self.on.words * self.on.hidden)
                self.activations -= self.head.kept
                self.whole -= self.head.gradient
            if self.shares:
                self._reduce(stage, index, last)
            else:
                self._collect(unit, stage.backwards)
        self.reducing = self.reduced = 0
        stage.backwards += 1
        self.deferred.append(deferred)
        self._look()
        while len(self.deferred) > self.puts_off:
            self.activations -= self.deferred.pop(0)
        self._look()

    def _kept(self, stage: _Stage, index: int) -> int:
        """A layer's; the first one's input is memory that the stage has for what it receives."""
        received = not stage.begins and index == 0
        return self.layer.kept - (self.on.residual if received else 0)

    def _prefetch(self, stage: _Stage, index: int) -> None:
        """Gather ahead."""
        if self.shards > 1 and stage.units[index].kind != EMBEDDING:
            self.buffer = self.element * self.padded[stage.units[index].kind]
            self._look()

    def _gather(self, stage: _Stage, index: int, ahead: bool = False) -> None:
        """Make a unit's weights whole, where they aren't: by way of a buffer, which `ahead` says is there."""
        if stage.here[index] or not self.shares:
            return
        size = self.element * self.padded[stage.units[index].kind]
        if self.shards > 1 and not ahead:
            cast = size // self.shards if self.element < self.kept_in else 0
            self._look(gathered=size + cast)
            self.buffer = size
        self.gathered += size
        stage.here[index] = True
        self._look()

    def _drop(self, stage: _Stage, index: int) -> None:
        if stage.here[index]:
            self.gathered -= self.element * self.padded[stage.units[index].kind]
            stage.here[index] = False

    def _collect(self, unit: Unit, before: int) -> None:
        """Add up a unit's gradients in one process; before: how many micro-batches have been added."""
        fresh, size = self.element * unit.largest, unit.elements
        if self.kept_in == FP32:
            self._look(whole=fresh)
            self.gradients += 0 if before else FP32 * size
        else:  # bf16 as it came, fp32 from the second on
            self._look(whole=fresh + (FP32 * unit.largest if before else 0))
            self.gradients += self.kept_in * size if before < 2 else 0
        self._look()

    def _reduce(self, stage: _Stage, index: int, last: bool) -> None:
        """Sum a unit's gradients over the ranks, or keep them whole until that is due."""
        unit, before = stage.units[index], stage.backwards
        fresh, whole = self.element * unit.elements, self.sums_in * self.padded[unit.kind]
        self._look(whole=fresh)
        waits = self.zero <= 1 and not last
        accumulated = self.sums_in * unit.elements if self.zero <= 1 and before else 0
        if waits:
            self.whole += 0 if before else self.sums_in * unit.elements
            return
        self._drop(stage, index)
        self.reducing = whole
        self._look(whole=0 if accumulated else fresh)
        self.whole -= accumulated
        own = whole // self.shards
        self._look(gathered=own + (whole if self.direct and self.shards > 1 else 0))
        if self.replicas > 1 and self.sums_in != self.kept_in:
            self.reduced += own
        # Where replicas wait for the step's end, shards do it in the dtype of sums.
        once = self.zero <= 1 or self.replicas > 1
        if self.zero >= 2 and self.replicas > 1:
            self.gradients += (0 if before else own) - (own if last else 0)
        if last or not once:
            times = 1 if once or self.kept_in == FP32 else 2  # bf16 is added up in fp32
            size = self.kept_in * self.padded[unit.kind] // self.shards
            self.gradients += size if once or before < times else 0
        self._look()
