from pathlib import Path

from omegaconf import OmegaConf

from trainwright.configs.compose import load_recipe
from trainwright.trainers.run_folder import config_text, run_folder, set_aside


def test_the_written_config_gives_the_recipe_back():
    recipe = load_recipe(["optim.lr=0.125"])
    written = OmegaConf.create(config_text(recipe, "a device"))
    assert written.optim.lr == 0.125
    assert written.versions.device == "a device"
    assert {"torch", "trainwright", "python"} <= written.versions.keys()
    assert run_folder(recipe).name == written.run.name


def test_what_is_set_aside_is_numbered(tmp_path: Path):
    for _ in range(2):
        (tmp_path / "run").mkdir()
        set_aside(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.1", "run.2"]
    assert set_aside(tmp_path / "run") is None
