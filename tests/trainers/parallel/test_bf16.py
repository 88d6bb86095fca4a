"""Weights in bf16 on many ranks: the bits of their rounding, and in what their gradients are added up."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import RankPool
from tests.trainers.parallel.test_shards import SMALL
from trainwright.configs.compose import load_recipe
from trainwright.configs.schema import OptimConfig, ParallelConfig, Recipe
from trainwright.models.counter_random import key_of, normal
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.llama_plan import llama_plan, llama_units
from trainwright.models.storage import Piece
from trainwright.trainers.bf16_adamw import Bf16AdamW
from trainwright.trainers.build import build_stepper
from trainwright.trainers.facts import count_all
from trainwright.trainers.parallel.apply import parallelize
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.parallel.shards import local_pieces, materialise
from trainwright.trainers.parallel.stages import Stages, layers_of_rank
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.precision import Bf16Weights
from trainwright.trainers.tasks.pretrain import Pretraining

State = dict[str, tuple[Piece, ...]]  # by parameter: the weight and its moments, or a gradient


def drawn_gradient(piece: Piece, name: str, step: int) -> Tensor:
    """What the whole parameter's would be there."""
    height, width = (*piece.values.shape, 1)[:2]
    rows, columns = (
        torch.arange(piece.row, piece.row + height),
        torch.arange(piece.column, piece.column + width),
    )
    return normal(key_of("gradient", step, name), rows, columns).view(piece.values.shape)


def updated(parallel: ParallelConfig) -> State:
    """On every rank: three updates with the gradients that every layout has."""
    with open_ranks(parallel, Cpu()) as ranks:
        recipe = Recipe(model=replace(SMALL, num_hidden_layers=2), parallel=parallel)
        config, pp = recipe.model, ranks.degrees.pp
        with torch.device("meta"):
            model: nn.Module = Llama(config)
            if pp > 1:
                model = Stages(Llama(config, layers=own) for own in layers_of_rank(recipe, ranks.pp_rank, pp))
        model.to(torch.bfloat16)
        parallelize(model, llama_plan(config), llama_units(config), ranks, parallel, torch.bfloat16, Cpu())
        materialise(model, torch.device("cpu"))
        pieces = local_pieces(model)
        init_weights(pieces, config, seed=3)
        optimizer = Bf16AdamW(pieces, OptimConfig(), seed=3, platform=Cpu(), stochastic=True)
        for step in range(3):
            optimizer.update({n: drawn_gradient(piece, n, step) for n, piece in pieces.items()}, 1e-4, None)
        return {
            name: tuple(
                piece._replace(values=values)
                for values in (piece.values, *map(optimizer.state[piece.values].get, ("exp_avg", "exp_avg_sq")))
                if values is not None
            )
            for name, piece in pieces.items()
        }


def of_whole(piece: Piece, whole: Tensor) -> Tensor:
    """What lies in `whole` where the piece does."""
    part = whole[piece.row : piece.row + piece.values.shape[0]]
    return part if part.dim() == 1 else part[:, piece.column : piece.column + piece.values.shape[1]]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, {}), (3, {}), (2, {"tp": 2}), (4, {"tp": 2}), (2, {"zero": 0}), (2, {"pp": 2}), (4, {"pp": 2})],
)
def test_the_same_update_is_rounded_to_the_same_bits(
    run_on_ranks: RankPool, ranks: int, parallel: dict[str, int]
):
    (alone,) = run_on_ranks(updated, 1, ParallelConfig())
    states = run_on_ranks(updated, ranks, ParallelConfig(**parallel))
    assert {name for state in states for name in state} == alone.keys()
    for state in states:
        assert "pp" in parallel or state.keys() == alone.keys()
        for name, pieces in state.items():
            assert len(pieces) == 3
            for piece, (whole, *_) in zip(pieces, alone[name], strict=True):
                assert torch.equal(piece.values, of_whole(piece, whole)), name


def gradients(words: list[str]) -> State:
    """On every rank: those of a step on the first batch."""
    recipe, platform = load_recipe(words), Cpu()
    with open_ranks(recipe.parallel, platform) as ranks:
        task = Pretraining(recipe, ranks)
        stepper, _ = build_stepper(recipe, task, ranks, platform, None)
        with task.open_stream(None) as stream:
            batch = next(stream)
        stepper.forward_backward(batch, count_all(batch, ranks, platform.device).target_tokens)
        weights = stepper.weights
        assert isinstance(weights, Bf16Weights)
        assert all(weight.dtype == torch.bfloat16 for weight in weights.local.values())
        assert all(weight.grad is None for weight in weights.stored.values())
        return {n: (piece._replace(values=weights.gradients[n]),) for n, piece in weights.pieces.items()}


def relative_error(states: list[State], alone: State) -> float:
    """The root of the mean square of the difference, over that of the gradient."""
    difference = size = 0.0
    for state in states:
        for name, (piece,) in state.items():
            expected = of_whole(piece, alone[name][0].values).double()
            difference += float((piece.values.double() - expected).square().sum())
            size += float(expected.square().sum())
    return (difference / size) ** 0.5


# What remains is one rounding to bf16; adding up in bf16 would be several.
ONE_ROUNDING = 1.8e-3


@pytest.mark.parametrize("layout", ["zero=0", "zero=1", "zero=2", "zero=3", "dp_replicate=2", "tp=2"])
def test_micro_batches_add_up_in_fp32(run_on_ranks: RankPool, base: list[str], layout: str):
    words = [*base, "precision=bf16_sr", "train.micro_batch_size=1"]
    (alone,) = run_on_ranks(gradients, 1, words)
    assert all(piece.values.dtype == torch.float32 for (piece,) in alone.values())
    found = run_on_ranks(gradients, 4 if "replicate" in layout else 2, [*words, f"parallel.{layout}"])
    if layout in ("zero=2", "zero=3", "tp=2"):
        assert all(piece.values.dtype == torch.float32 for state in found for (piece,) in state.values())
    error = relative_error(found, alone)
    assert error < (3e-2 if layout == "tp=2" else ONE_ROUNDING)  # peers add up their activations in bf16


def test_a_single_micro_batch_keeps_its_gradient_in_bf16(run_on_ranks: RankPool, base: list[str]):
    for words in ([], ["parallel.zero=3"], ["parallel.tp=2"]):
        for state in run_on_ranks(gradients, 2 if words else 1, [*base, "precision=bf16", *words]):
            assert all(piece.values.dtype == torch.bfloat16 for (piece,) in state.values())


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("fp32", 0.0, ONE_ROUNDING), ("bf16", 1.05 * ONE_ROUNDING, 1e-2)]
)
def test_gradients_are_summed_over_ranks_in_the_dtype_that_is_asked_for(
    run_on_ranks: RankPool, base: list[str], dtype: str, least: float, most: float
):
    words: list[Any] = [*base, "precision=bf16", "train.micro_batch_size=2"]
    (alone,) = run_on_ranks(gradients, 1, words)
    found = run_on_ranks(gradients, 4, [*words, f"precision.reduce={dtype}"])
    assert least <= relative_error(found, alone) < most
