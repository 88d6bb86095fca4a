"""The table of layouts can fail: it reports each of these mistakes in a sum over ranks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from benchmarks.layouts import beyond, differences
from tests.ranks import RankPool
from tests.trainers.parallel.runs import Alone, Line, train_and_read
from trainwright.trainers import facts, loop
from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.parallel import deferred, tensor_parallel
from trainwright.trainers.parallel.apply import Layout
from trainwright.trainers.parallel.collectives import _GatherSequence, _Sum, _sum
from trainwright.trainers.steppers import pipeline, updating
from trainwright.trainers.steppers.eager import EagerStepper

STEPS = 10


def no_change(*args: Any) -> None:
    pass


def divide_by_the_ranks(module: FSDPModule, factor: float) -> None:
    """What FSDP2 does unless it is told otherwise; the default itself leaves it to gloo, which sums shards."""
    set_gradient_divide_factor(module, 2.0)


def by_own_targets(stepper: EagerStepper, batch: Batch, target_tokens: int) -> Tensor:
    """The gradient of the mean over ranks of each rank's mean."""
    own = int((batch.targets != IGNORE).sum())
    return forward_backward(stepper, batch, own * stepper.layout.ranks.data_ranks)


def mean_of_own_loss(loss: Tensor, *others: Any) -> Any:
    return agree(loss / others[-1].size, *others)


def cut_only(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Of the gathered positions' gradient this peer's own, without the other peers' parts of it."""
    return grad.chunk(ctx.peers.size, 1)[ctx.peers.rank].contiguous(), None


def summed_again(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _sum(grad, ctx.peers), None


def sum_keeping_peers(ctx: Any, x: Tensor, peers: Any) -> Tensor:
    ctx.peers = peers
    return _sum(x, peers)


def forgetting_the_others(layout: Layout, model: Any, last: bool) -> None:
    before_backward(layout, model, last)
    model.zero_grad()


set_gradient_divide_factor = FSDPModule.set_gradient_divide_factor
forward_backward, agree, before_backward = EagerStepper.forward_backward, loop.agree, Layout.before_backward


def scaling(schedule: Any) -> Any:
    """What PyTorch's schedules do unless they are told otherwise."""
    return lambda *args, **options: schedule(*args, **(options | {"scale_grads": True}))


def counted_by_all(batch: Batch, ranks: Any) -> list[float]:
    return count(batch, replace(ranks, tp_rank=0, pp_rank=0))


def forgetting_products(waiting: list[Any]) -> None:
    waiting.clear()


count, SCHEDULES = facts.count, {name: scaling(made) for name, made in pipeline.SCHEDULES.items()}
PP_2 = ["parallel.pp=2", "train.micro_batch_size=2"]
ZERO_BUBBLE = [*PP_2, "parallel.pp_schedule=zero_bubble"]
FSDP_2, TP_2, TP_2_WHOLE = ["parallel.zero=3"], ["parallel.tp=2"], ["parallel.tp=2", "parallel.sp=false"]

# The mistake: the layout on two ranks, what is replaced by what, and the figure that must show it.
MISTAKES: dict[str, tuple[list[str], list[tuple[Any, str, Any]], str]] = {
    "FSDP takes the mean over the ranks, as it does by default": (
        FSDP_2,
        [(FSDPModule, "set_gradient_divide_factor", divide_by_the_ranks)],
        "grad_norm",
    ),
    "replicas take the mean over the ranks": (
        ["parallel.zero=0"],
        [(FSDPModule, "set_gradient_divide_factor", divide_by_the_ranks)],
        "grad_norm",
    ),
    "each rank divides by its own targets": (
        FSDP_2,
        [(EagerStepper, "forward_backward", by_own_targets)],
        "grad_norm",
    ),
    "the loss is divided by the number of ranks": (FSDP_2, [(loop, "agree", mean_of_own_loss)], "first_loss"),
    "the norms' gradients are not summed": (TP_2, [(Layout, "sum_partial", no_change)], "grad_norm"),
    "entering a cut layer sums nothing backward": (
        TP_2_WHOLE,
        [(tensor_parallel, "enter", lambda x, peers: x)],
        "grad_norm",
    ),
    "gathering a sequence sums nothing backward": (
        TP_2,
        [(_GatherSequence, "backward", staticmethod(cut_only))],
        "grad_norm",
    ),
    "leaving a cut layer sums backward too": (
        TP_2_WHOLE,
        [(_Sum, "forward", staticmethod(sum_keeping_peers)), (_Sum, "backward", staticmethod(summed_again))],
        "grad_norm",
    ),
    "weights that are whole on every peer count twice": (
        TP_2,
        [(updating, "counts_here", lambda weight: True)],
        "param_norm",
    ),
    "tensor-parallel peers both bring their loss in": (
        TP_2,
        [(EagerStepper, "_share", lambda stepper, loss: loss)],
        "first_loss",
    ),
    "a pipeline divides by the micro-batches, as it does by default": (
        PP_2,
        [(pipeline, "SCHEDULES", SCHEDULES)],
        "grad_norm",
    ),
    "a zero-bubble pipeline divides by the micro-batches": (
        ZERO_BUBBLE,
        [(pipeline, "SCHEDULES", SCHEDULES)],
        "grad_norm",
    ),
    "every rank of a pipeline counts the batch": (PP_2, [(facts, "count", counted_by_all)], "tokens"),
    "of a pipeline's micro-batches the last alone counts": (
        PP_2,
        [(Layout, "before_backward", forgetting_the_others)],
        "grad_norm",
    ),
    "what was put off is never made": (ZERO_BUBBLE, [(deferred, "_make", forgetting_products)], "grad_norm"),
    "of several micro-batches the last alone counts": (
        ["parallel.zero=2", "train.micro_batch_size=1"],
        [(Layout, "before_backward", forgetting_the_others)],
        "grad_norm",
    ),
}


@contextmanager
def mistaken(mistake: str) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, wrong in MISTAKES[mistake][1]:
            stack.enter_context(patch.object(owner, name, wrong))
        yield


def train_mistaken(mistake: str, overrides: list[str]) -> list[Line] | None:
    with mistaken(mistake):
        return train_and_read(overrides)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_table_shows_a_mistaken_sum(
    run_on_ranks: RankPool, base: list[str], alone: Alone, tmp_path: Path, mistake: str
):
    overrides, _, figure = MISTAKES[mistake]
    words = [*base, *overrides, f"run.dir={tmp_path}", "run.name=run", f"train.steps={STEPS}"]
    found = beyond(differences(run_on_ranks(train_mistaken, 2, mistake, words)[0], alone()), "fp32")
    assert figure in found
