"""A run's folder: where it is, what its config.yaml says, and what happens to one that is there already."""

import importlib.metadata
import os
import platform as host
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from trainwright import __version__, verdict
from trainwright.configs.schema import ModelConfig, Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.checkpoint.place import Place, place
from trainwright.trainers.parallel.ranks import Ranks
from trainwright.trainers.platform.environment import in_force

PACKAGES = ("torch", "numpy", "hydra-core", "tokenizers", "safetensors", "datasets")

# What the data cursor counts in: another value of any of these and its numbers mean other documents.
STREAM_KEYS = (
    *("seed", "train.seq_len", "data.format", "data.paths", "data.pattern", "data.document", "data.text_key"),
    *("data.subset", "data.split", "data.on_error", "data.mix", "data.max_piece_bytes", "data.document_mask"),
    *("data.tokenizer", "data.validation"),
)


def run_folder(recipe: Recipe) -> Path:
    """``run.dir/run.name``."""
    assert recipe.run.name is not None
    return Path(recipe.run.dir).expanduser() / recipe.run.name


def checkpoint_folder(recipe: Recipe) -> Place:
    """Where the run's checkpoints are: in its folder, or below ``checkpoint.dir`` under its name.

    Raises:
        BadRequest: `checkpoint.dir` has a protocol that can't be used here.
    """
    if recipe.checkpoint.dir is None:
        return place(run_folder(recipe) / "checkpoints")
    return place(recipe.checkpoint.dir, "checkpoint.dir") / str(recipe.run.name)


def config_text(recipe: Recipe, device: str) -> str:
    """config.yaml: the resolved recipe, with versions of everything that ran it, and its environment."""
    versions = {"trainwright": __version__, "python": host.python_version(), "device": device}
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return OmegaConf.to_yaml({**asdict(recipe), "versions": versions, "environment": in_force(recipe.platform)})


def set_aside(folder: Path) -> Path | None:
    """Make room for a run that starts afresh: what is in `folder` moves to ``NAME.1``, ``NAME.2``, ..."""
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)


def starts_afresh(recipe: Recipe, ranks: Ranks) -> bool:
    """Whether what is there already is to be left: not once a launcher has restarted the ranks.

    A supervisor knows whether workers of its launch have been at the run, however often torchrun has started
    since. One node of those that are there is enough: the others may be new. All ranks call it.
    """
    if verdict.FOLDER in os.environ:
        restarted = verdict.opened()
    else:
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return bool(ranks.share(recipe.resume == "none") and not any(ranks.gather(restarted)))


def make_room(checkpoints: Place) -> None:
    """See that a run that starts afresh finds no checkpoints of an earlier one.

    Raises:
        BadRequest: some are where they can't be moved.
    """
    if not checkpoints.names():
        return
    if not checkpoints.local:
        raise BadRequest(f"resume=none and {checkpoints} has checkpoints: give another run.name or delete them")
    set_aside(Path(checkpoints.path))


# What a Llama's parameters are: their names and shapes, and what they compute. Not what they start from.
STARTS = ("pretrained", "initializer_range", "scaled_init")
MODEL_KEYS = tuple(f"model.{item.name}" for item in fields(ModelConfig) if item.name not in STARTS)


def check_same_run(recipe: Recipe, before: DictConfig | ListConfig, checkpoint: Place) -> None:
    """Refuse to go on from a checkpoint of another model, or whose data cursor counts in another stream.

    before: the checkpoint's config.yaml.

    Raises:
        BadRequest: the first key that differs, with both values.
    """
    now = OmegaConf.create(asdict(recipe))
    for key in (*STREAM_KEYS, *MODEL_KEYS):
        was, asked = OmegaConf.select(before, key), OmegaConf.select(now, key)
        if was != asked:
            raise BadRequest(
                f"the checkpoint {checkpoint} was made with {key}={was} and the recipe says {asked}: keep the "
                "value, or start afresh with another run.name"
            )


# What a run may differ in from its checkpoint without a word: where it is kept and watched.
UNSAID = ("run", "resume", "monitor", "compile_cache", "launch", "plan", "versions")


def changed(recipe: Recipe, before: DictConfig | ListConfig) -> dict[str, list[Any]]:
    """The keys that a run goes on with other values of, each with the value before and the one now.

    before: the checkpoint's config.yaml.
    """
    was, now = (dict(_leaves(config)) for config in (OmegaConf.to_container(before), asdict(recipe)))
    return {
        key: [was[key], now[key]]
        for key in was.keys() & now.keys()
        if was[key] != now[key] and key.split(".")[0] not in UNSAID
    }


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
