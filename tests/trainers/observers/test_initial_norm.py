import numpy as np
import pytest

from trainwright.configs.schema import Recipe
from trainwright.models.init import initial_norm
from trainwright.trainers.observers.base import Progress, Run
from trainwright.trainers.observers.initial_norm import InitialNorm


def said_after(step: int, recipe: Recipe, tmp_path) -> list[tuple[str, dict[str, object]]]:
    said = []
    observer = InitialNorm()
    run = Run(recipe, tmp_path, 10, 100, 1, lambda event, **fields: said.append((event, fields)))
    progress = Progress(step, 0, np.zeros((1, 1), np.int64))
    observer.on_start(run, progress)
    observer.on_step(progress, {"step": step, "param_norm": 12.5})
    return said


def test_the_first_step_tells_the_norm_and_what_was_expected(tmp_path):
    expected = initial_norm(Recipe().model)
    assert said_after(1, Recipe(), tmp_path) == [("initial_norm", {"param_norm": 12.5, "expected": expected})]


@pytest.mark.parametrize("step", [2, 500])
def test_later_steps_say_nothing(step: int, tmp_path):
    assert said_after(step, Recipe(), tmp_path) == []


def test_weights_that_were_given_lead_to_expect_nothing(tmp_path):
    recipe = Recipe()
    recipe.model.pretrained = "somewhere"
    assert said_after(1, recipe, tmp_path) == [("initial_norm", {"param_norm": 12.5})]
