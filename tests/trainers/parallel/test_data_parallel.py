"""Gradients are sums over the data-parallel ranks: under every zero level, hybrid or not, with TP or without.

Beside one process they are the same to rounding; where all numbers are whole, to the bit. Nothing is divided.
"""

import functools
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from tests.ranks import RankPool
from tests.trainers.tiny import tiny_batch, tiny_recipe
from trainwright.configs.schema import ParallelConfig, Recipe
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.llama_plan import llama_plan, llama_units
from trainwright.trainers.data.batch import IGNORE, Batch
from trainwright.trainers.parallel.apply import parallelize
from trainwright.trainers.parallel.data_parallel import apply_data_parallel, before_backward
from trainwright.trainers.parallel.direct import send_directly
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.parallel.shards import local, local_pieces, materialise
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.steppers.eager import EagerStepper

LAYOUTS: list[tuple[int, dict[str, int]]] = [
    *((2, {"zero": zero}) for zero in range(4)),
    *((4, {"zero": zero, "dp_replicate": 2}) for zero in (1, 2, 3)),
    *((4, {"zero": zero, "tp": 2}) for zero in range(4)),
]
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
EIGHT = SLOW((8, {"zero": 3, "dp_replicate": 2, "tp": 2}))


def named(layout: tuple[int, dict[str, int]]) -> str:
    return " ".join(f"{key}={value}" for key, value in layout[1].items())


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(batch.tokens, batch.documents, batch.targets)
    return loss


def gradients_here(recipe: Recipe, parallel: ParallelConfig) -> dict[str, tuple[Tensor, int, int]]:
    """This rank's parts of the gradients of four sequences, and where each lies in the whole."""
    config, batch = recipe.model, tiny_batch()
    targets = int((batch.targets != IGNORE).sum())
    with open_ranks(parallel, Cpu()) as ranks:
        with torch.device("meta"):
            model = Llama(config)
        plan, units = llama_plan(config), llama_units(config)
        layout = parallelize(model, plan, units, ranks, parallel, torch.float32, Cpu())
        materialise(model, torch.device("cpu"))
        pieces = local_pieces(model)
        init_weights(pieces, config, seed=3)
        stepper = EagerStepper(model, loss_of, recipe, layout, torch.device("cpu"))
        rows = 4 // ranks.data_ranks
        stepper.forward_backward(batch.sequences(ranks.data_rank * rows, (ranks.data_rank + 1) * rows), targets)
        found = stepper.weights.gradients
        return {name: (found[name].clone(), piece.row, piece.column) for name, piece in pieces.items()}


@pytest.mark.parametrize("layout", [*LAYOUTS[:5], *map(SLOW, LAYOUTS[5:10]), LAYOUTS[10], EIGHT], ids=named)
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_parts_of_a_gradient_are_those_of_one_process(
    run_on_ranks: RankPool, layout: tuple[int, dict[str, int]], micro_batch_size: int
):
    ranks, parallel = layout
    recipe = tiny_recipe("model.intermediate_size=512", f"train.micro_batch_size={micro_batch_size}")
    (alone,) = run_on_ranks(gradients_here, 1, recipe, ParallelConfig())
    for parts in run_on_ranks(gradients_here, ranks, recipe, ParallelConfig(**parallel)):
        assert parts.keys() == alone.keys()
        for name, (part, row, column) in parts.items():
            whole = alone[name][0]
            cut = whole[row : row + part.shape[0]]
            cut = cut if cut.dim() == 1 else cut[:, column : column + part.shape[1]]
            torch.testing.assert_close(part, cut, rtol=1e-4, atol=1e-5 * float(whole.abs().max()), msg=name)


def whole_numbers(parallel: ParallelConfig, directly: bool) -> tuple[list[float], list[Any]]:
    """Two micro-batches' gradients of two matrices, and by what FSDP divides and how it reduces.

    Of data-parallel rank r each micro-batch's gradient is r + 1 everywhere.
    """
    reduced: list[Any] = []
    factors = _fsdp_collectives._get_gradient_divide_factors

    def recorded(*args: Any) -> Any:
        reduced.append(factors(*args))
        return reduced[-1]

    with open_ranks(parallel, Cpu()) as ranks:
        model = nn.Sequential(*(nn.Linear(6, 5, bias=False) for _ in range(2)))
        units = [[layer] for layer in model]
        apply_data_parallel(model, units, ranks, parallel.zero, torch.float32, torch.float32)
        if directly:
            send_directly(model)
        with patch.object(_fsdp_collectives, "_get_gradient_divide_factors", recorded):
            for last in (False, True):
                before_backward(model, parallel.zero, last)
                # Of each layer by itself: the gradient of the sum of its outputs is what came in.
                for layer in model:
                    came_in = torch.full((1, 6), float(ranks.data_rank + 1))
                    layer(came_in).sum().backward()
        gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        assert len(gradients) == 2
        return torch.cat([gradient.flatten() for gradient in gradients]).tolist(), reduced


@pytest.mark.parametrize("directly", [True, False], ids=["by sends", "by the backend"])
@pytest.mark.parametrize("layout", [*LAYOUTS[:5], *map(SLOW, LAYOUTS[5:7])], ids=named)
def test_nothing_is_divided(run_on_ranks: RankPool, layout: tuple[int, dict[str, int]], directly: bool):
    ranks, parallel = layout
    expected = 2.0 * sum(range(1, ranks + 1))
    for gradients, reduced in run_on_ranks(whole_numbers, ranks, ParallelConfig(**parallel), directly):
        assert set(gradients) == {expected}
        assert reduced
        for before, after, *operations in reduced:
            assert {before, after} <= {None, 1.0}
            assert operations == [dist.ReduceOp.SUM] * 2
