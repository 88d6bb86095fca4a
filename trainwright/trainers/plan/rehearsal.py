"""A step of the full job in one process: the run's own code, tensors without values, ranks that aren't there.

What would end a rank on the cluster ends the rehearsal: shapes that don't fit each other, a plan that isn't the
model's. What it makes is followed: the memory by kind and moment, and each collective.
"""

import math
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.configs.degrees import Degrees, resolve_degrees
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.parallel.counting import Counts
from trainwright.trainers.parallel.traffic import micro_batches
from trainwright.trainers.plan.memory import Memory
from trainwright.trainers.plan.memory_tracker import RECEIVED, ByKind
from trainwright.trainers.plan.rehearsal_ranks import Rehearsed, pretended_ranks
from trainwright.trainers.plan.rehearsal_step import Blank, Watched, watch_steps
from trainwright.trainers.platform.choose import PLATFORMS


class Rehearsal(NamedTuple):
    """What a rank of a run would hold and send in a step.

    memory: when it is the most. by_moment: the same in each part of the step. collectives: calls and bytes by
    axis of the mesh and kind, as `traffic.by_group` has them. micro_batches: of the step, and how many of them
    were rehearsed.
    """

    rank: int
    world: int
    memory: Memory
    by_moment: dict[str, Memory]
    collectives: Counts
    micro_batches: tuple[int, int]
    seconds: float
    processor_seconds: float


def rehearse(recipe: Recipe, world: int, rank: int = 0, platform: str = "cpu") -> Rehearsal:
    """Build `recipe`'s model on `rank` of `world` and take two steps; the second is told of.

    platform: that of the cluster, by its name.

    Raises:
        BadRequest: the rank would fail; the sentence names the module where it can be told.
    """
    started, worked = time.perf_counter(), time.process_time()
    recipe = replace(recipe, train=replace(recipe.train, compile=False))
    degrees = resolve_degrees(recipe.parallel, world)
    sizes = micro_batches(recipe, degrees)
    first, second = rehearsed(sizes, degrees)
    modes = FakeTensorMode(allow_non_fake_inputs=True), HostReads()
    with pretended_ranks(recipe.parallel, world, rank) as ranks, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will say them
        try:
            task, steps = Blank(recipe, ranks), [sum(first), sum(second)]
            watched = watch_steps(task, Rehearsed(PLATFORMS[platform]), steps, modes)
        except (ValueError, RuntimeError, AssertionError, TypeError) as error:
            raise BadRequest(f"rank {rank} of {world} would fail: {sentence_of(error)}") from error
    more = len(sizes) / len(second)
    by_moment = {name: memory_of_kinds(kinds, more) for name, kinds in watched.by_moment.items()}
    return Rehearsal(
        rank,
        world,
        max(by_moment.values(), key=lambda memory: memory.total),
        by_moment,
        _of_all(watched, len(first), len(second), len(sizes)),
        (len(sizes), len(second)),
        time.perf_counter() - started,
        time.process_time() - worked,
    )


def stage_ranks(degrees: Degrees) -> list[int]:
    """The first rank of each stage of the pipeline; the other ranks of a stage do the same or less."""
    each = math.prod(degrees) // degrees.pp
    return [stage * each for stage in range(degrees.pp)]


def rehearsed(sizes: Sequence[int], degrees: Degrees) -> tuple[list[int], list[int]]:
    """The micro-batches of the first and of the second step, of a step's `sizes`.

    Of many the second has the first, one in the middle and the last; in a pipeline as many as fill it, and are
    done in turns of the same kind. The first step has so many less that the difference tells what more of them
    send.
    """
    few, enough = (degrees.pp, 2 * degrees.pp) if degrees.pp > 1 else (2, 3)
    many = len(sizes) > enough and (degrees.pp == 1 or len(sizes) % degrees.pp == 0)
    second = [*sizes[: enough - 1], sizes[-1]] if many else list(sizes)
    few = few if many else min(len(sizes), few if degrees.pp > 1 else 1)
    return [*sizes[: few - 1], sizes[-1]], second


def _of_all(watched: Watched, first: int, second: int, count: int) -> Counts:
    """The collectives of a step of `count` micro-batches, from those of steps of `first` and `second`."""
    if count == second:
        return watched.collectives
    times, none = (count - second) // (second - first), (0, 0)
    more = {key: watched.before.get(key, none) for key in watched.collectives}
    return {
        key: (calls + times * (calls - more[key][0]), sent + times * (sent - more[key][1]))
        for key, (calls, sent) in watched.collectives.items()
    }


def memory_of_kinds(kinds: ByKind, more: float = 1.0) -> Memory:
    """As `Memory`. more: of the room for what stages receive so much: all micro-batches of a step have it."""
    received = round(kinds[RECEIVED] * more)
    known = {kind: kinds[kind] for kind in Memory._fields}
    return Memory(**known | {"activations": known["activations"] + received})


class HostReads(TorchDispatchMode):
    """Lets the host read tensors without values: an index is the first, any other number is one."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return 1.0 if dtype.is_floating_point else int(dtype != torch.int64)
        return function(*args, **(kwargs or {}))


def sentence_of(error: BaseException) -> str:
    """What went wrong, and in which module of the model."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    said = " ".join(str(causes[-1]).split("\n\n")[0].split()) or type(causes[-1]).__name__
    where = _module_of(causes)
    return f"{said}, in {where}" if where else said


def _module_of(errors: Sequence[BaseException]) -> str | None:
    """The name of the innermost module in whose forward pass one was raised, in the largest model around it."""
    called = [
        value
        for error in errors
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(value := frame.f_locals.get("self"), nn.Module)
    ]
    named = [{id(module): name for name, module in model.named_modules()} for model in called]
    names = [name for known in named for module in called if (name := known.get(id(module)))]
    return max(names, key=lambda name: name.count(".")) if names else None
