"""What a pipeline's stages get, give and say; that the numbers are one process's is in the table of layouts."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.ranks import RankPool
from tests.trainers.tiny import TINY, tiny_batch, tiny_recipe
from trainwright.configs.compose import load_recipe
from trainwright.configs.schema import Recipe
from trainwright.models.cross_entropy import IGNORE
from trainwright.models.init import init_weights
from trainwright.models.llama import Llama
from trainwright.models.llama_plan import llama_plan, llama_units
from trainwright.models.storage import whole_pieces
from trainwright.trainers.data.batch import Batch
from trainwright.trainers.parallel.apply import Layout, parallelize
from trainwright.trainers.parallel.ranks import open_ranks
from trainwright.trainers.parallel.shards import local_pieces, materialise
from trainwright.trainers.parallel.stages import Stages, layers_of_rank
from trainwright.trainers.platform.cpu import Cpu
from trainwright.trainers.steppers.pipeline import PipelineStepper

WORDS = [*TINY, "model.num_hidden_layers=4", "model.tie_word_embeddings=false", "parallel.pp=2"]
SCHEDULES = ("1f1b", "interleaved_1f1b", "zero_bubble")


def loss(model: Any, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
    made: torch.Tensor = model(batch.tokens, batch.documents, batch.targets, hidden=hidden)
    return made


def odd_batch() -> Batch:
    """Three sequences: the last of two micro-batches has to be filled up."""
    return tiny_batch().sequences(0, 3)


def one_step(words: list[str]) -> tuple[float, float, dict[str, torch.Tensor], list[bool]]:
    """On every rank: losses of training and evaluation, gradients, and which backward was called the last."""
    recipe = load_recipe(words)
    with open_ranks(recipe.parallel, Cpu()) as ranks:
        with torch.device("meta"):
            parts = Stages(Llama(recipe.model, layers=own) for own in layers_of_rank(recipe, ranks.pp_rank, 2))
        plan, units = llama_plan(recipe.model), llama_units(recipe.model)
        layout = parallelize(parts, plan, units, ranks, recipe.parallel, torch.float32, Cpu())
        materialise(parts, torch.device("cpu"))
        init_weights(local_pieces(parts), recipe.model, recipe.seed)
        stepper = PipelineStepper(parts, loss, recipe, layout, torch.device("cpu"))
        said: list[bool] = []
        with patch.object(Layout, "before_backward", lambda layout, model, last: said.append(last)):
            trained = float(stepper.forward_backward(odd_batch(), targets()))
        return trained, float(stepper.evaluate(odd_batch())), stepper.weights.gradients, said


def targets() -> int:
    return int((odd_batch().targets != IGNORE).sum())


def alone(recipe: Recipe) -> tuple[float, dict[str, torch.Tensor]]:
    model = Llama(recipe.model)
    init_weights(whole_pieces(model), recipe.model, recipe.seed)
    total = loss(model, odd_batch())
    (total / targets()).backward()
    return float(total.detach()), {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_is_that_of_one_process(run_on_ranks: RankPool, schedule: str):
    total, expected = alone(tiny_recipe(*WORDS[-3:-1]))
    first, last = run_on_ranks(one_step, 2, [*WORDS, f"parallel.pp_schedule={schedule}"])
    assert first[:2] == (0.0, 0.0)  # the last stage alone has a loss
    assert last[:2] == pytest.approx((total, total), rel=1e-6)
    assert first[2].keys().isdisjoint(last[2])
    gradients = first[2] | last[2]
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    stages = 2 if schedule == "interleaved_1f1b" else 1
    for said in first[3], last[3]:
        assert len(said) == 2 * stages
        assert said.count(True) == (0 if schedule == "zero_bubble" else stages)  # once a step of each stage
