from pathlib import Path

import pytest
from omegaconf import OmegaConf

from trainwright import verdict
from trainwright.configs.compose import load_recipe
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.run_folder import config_text, run_folder, set_aside, starts_afresh


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


class Two(Ranks):
    """Rank 0 of two, and what the other one says."""

    other = False

    def gather(self, value):
        return [value, self.other]


def test_a_launch_starts_afresh_until_it_has_opened_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, ranks = load_recipe(["resume=none"]), Two()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")  # it may have failed while it loaded, or joined late
    monkeypatch.setenv(verdict.FOLDER, str(tmp_path / "1"))
    assert starts_afresh(recipe, ranks)
    assert not starts_afresh(load_recipe([]), ranks)
    monkeypatch.setattr(ranks.__class__, "other", True)  # the other node was there before this one
    assert not starts_afresh(recipe, ranks)
    monkeypatch.setattr(ranks.__class__, "other", False)
    verdict.note_opened()
    assert not starts_afresh(recipe, ranks)
    monkeypatch.setenv(verdict.FOLDER, str(tmp_path / "2"))  # torchrun started again
    assert not starts_afresh(recipe, ranks)


@pytest.mark.parametrize("count", ["0", "1"])
def test_without_a_supervisor_torchruns_count_tells(count: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(verdict.FOLDER, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert starts_afresh(load_recipe(["resume=none"]), Ranks()) is (count == "0")
