import subprocess
import sys

import pytest

from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.observers import build_observers


def names(recipe, folder):
    return [type(observer).__name__ for observer in build_observers(recipe, folder)]


def test_the_order_and_the_switches(tmp_path, fake_module):
    fake_module("wandb")
    fake_module("mlflow")
    fake_module("mlflow.entities")
    recipe = Recipe()
    files = ["Goodput", "MetricsFile", "EventsFile", "InitialNorm"]
    assert names(recipe, tmp_path) == [*files, "TensorBoard", "Report", "ConsoleLines"]
    recipe.monitor.wandb = recipe.monitor.mlflow = True
    recipe.monitor.tensorboard = False
    assert names(recipe, tmp_path) == [*files, "WandB", "MLflow", "Report", "ConsoleLines"]


def test_a_missing_tracker_is_known_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    recipe = Recipe()
    recipe.monitor.wandb = True
    with pytest.raises(BadRequest, match=r"monitor\.wandb"):
        build_observers(recipe, tmp_path)


def test_what_is_not_switched_on_is_not_imported():
    code = (
        "import sys; from pathlib import Path; from trainwright.configs.schema import Recipe;"
        "from trainwright.trainers.observers import build_observers; build_observers(Recipe(), Path('.'));"
        "print([name for name in ('torch', 'wandb', 'mlflow') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
