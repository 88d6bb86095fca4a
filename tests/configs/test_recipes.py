"""The recipes of the package: each can be built, fits its ranks, and stands in the docs as it is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

from trainwright.cli import main
from trainwright.configs.compose import load_recipe
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.models.decoder import decoder

CONFIGS = Path(load_recipe.__code__.co_filename).parent
DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"

PUBLISHED = {
    # As Transformers counts the checkpoints that were released.
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama_1b": 1_100_048_384,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    # Our own.
    "mixtral_tiny": 9_185_536,
    "llama_350m": 341_099_520,
    "llama_125m": 123_688_704,
    "llama_34m": 33_694_208,
    "default": 5_475_584,
}


class Built(NamedTuple):
    recipe: Recipe
    ranks: int
    parameters: int


def degrees(name: str) -> dict[str, int]:
    """What the recipe's own file says of its layout; the rest is one."""
    said = yaml.safe_load((CONFIGS / "recipe" / f"{name}.yaml").read_text()).get("parallel", {})
    return {axis: said.get(axis, 1) for axis in ("tp", "pp", "dp_shard", "dp_replicate")}


@pytest.fixture
def build(monkeypatch, tmp_path):
    """A recipe with stand-ins for the data and the tokenizer, on the ranks that it is written for."""

    def built(name: str, *overrides: str, shards: int | None = None) -> Built:
        own = degrees(name)
        ranks = own["tp"] * own["pp"] * (shards or own["dp_shard"] * own["dp_replicate"])
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        (tmp_path / "data.jsonl").touch()
        (tmp_path / "tokenizer.json").touch()
        given = []
        if name != "default":
            given = [f"data.paths=[{tmp_path}/data.jsonl]", f"data.tokenizer.path={tmp_path}/tokenizer.json"]
        recipe = load_recipe([f"recipe={name}", *given, *overrides])
        with torch.device("meta"):
            model = decoder(recipe.model)
        return Built(recipe, ranks, sum(parameter.numel() for parameter in model.parameters()))

    return built


def rate(lr: float) -> str:
    return f"{lr:.1e}".replace("e-0", "e-") if lr else "0"


def row(name: str, built: Built) -> str:
    """Of the table in docs/recipes.md."""
    recipe, parallel, train = built.recipe, built.recipe.parallel, built.recipe.train
    axes = {"TP": parallel.tp, "PP": parallel.pp, "FSDP": parallel.dp_shard, "DP": parallel.dp_replicate}
    if parallel.zero < 3:
        axes = {(f"ZeRO-{parallel.zero}" if axis == "FSDP" else axis): n for axis, n in axes.items()}
    layout = " x ".join(f"{axis} {degree}" for axis, degree in axes.items() if degree > 1) or "1"
    tokens = train.global_batch_size * train.seq_len
    cells = (
        f"`{name}`",
        f"{built.parameters:,}",
        recipe.precision.mode,
        layout,
        f"{built.ranks:,}",
        f"{train.global_batch_size:,} x {train.seq_len:,}",
        f"{tokens:,}",
        f"{train.steps:,}",
        " to ".join(map(rate, (recipe.optim.lr, recipe.optim.min_lr))),
    )
    return f"| {' | '.join(cells)} |"


def test_every_recipe_is_tested():
    assert {path.stem for path in (CONFIGS / "recipe").glob("*.yaml")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_fits_its_ranks_has_the_published_size_and_is_told_as_it_is(name, build):
    built = build(name)
    assert built.parameters == PUBLISHED[name]
    assert row(name, built) in DOCS.read_text().splitlines(), row(name, built)


@pytest.mark.parametrize("name", PUBLISHED)
def test_any_number_of_ranks_has_a_share(name, build):
    for shards in (1, 2, 16):
        if shards <= degrees(name)["dp_shard"] * degrees(name)["dp_replicate"]:
            build(name, "parallel.dp_shard=-1", "parallel.dp_replicate=1", shards=shards)


def test_llama2_7b_has_the_settings_of_its_run(build):
    recipe, ranks, _ = build("llama2_7b")
    train, optim = recipe.train, recipe.optim
    assert (train.seq_len, train.global_batch_size, train.steps) == (4096, 1024, 500_000)
    assert (optim.lr, optim.min_lr, optim.schedule) == (3e-4, 3e-5, "cosine")
    assert (optim.warmup_steps, optim.decay_steps) == (2000, 480_000)
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-5)
    assert (optim.weight_decay, optim.decay, optim.clip) == (0.1, "all", 1.0)
    assert recipe.precision.mode == "bf16_sr"
    assert (recipe.parallel.tp, recipe.parallel.pp, ranks) == (8, 1, 4096)
    assert recipe.parallel.sp is not False
    assert train.micro_batch_size == 1
    assert train.global_batch_size // (ranks // 8) == 2
    assert (train.activation_checkpointing, recipe.model.coalesce) == ("selective", True)
    assert (recipe.model.scaled_init, recipe.model.initializer_range) == (True, 0.021)


@pytest.mark.parametrize("name", ["llama2_70b", "llama3_8b"])
def test_data_and_tokenizer_are_asked_for(name, monkeypatch):
    own = degrees(name)
    monkeypatch.setenv("WORLD_SIZE", str(own["tp"] * own["pp"] * own["dp_shard"] * own["dp_replicate"]))
    with pytest.raises(BadRequest) as caught:
        load_recipe([f"recipe={name}"])
    assert str(caught.value) == (
        "data.paths is empty: name the files, folders or globs of format jsonl; "
        "data.tokenizer.path is null and data.tokenizer.vocab_size=null trains none: "
        "name a tokenizer.json or a folder with one"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_shown_without_data(name, capsys):
    assert main(["train", f"recipe={name}", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown.keys() == asdict(Recipe()).keys()
    json.dumps(shown)
