"""The environment that a run gets before torch is imported, which is when libraries read it. No torch here."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trainwright.configs.check import no_shared_cache
from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.platform.presets import PRESETS, STALE

DEVICE_FILES = {
    "neuron": "neuron[0-9]*",
    "cuda": "nvidia[0-9]*",
}  # below /dev, in the order that they are looked for
DEV = Path("/dev")

_given: dict[str, str] = {}  # by this process: what libraries have read stays, for each run of a --multirun


class Applied(NamedTuple):
    """What became of a device's preset, by name: given; kept: what the user had set otherwise."""

    device: str
    given: dict[str, str]
    kept: dict[str, str]


def device_of(platform: str) -> str:
    """The device of a recipe's `platform`; for `auto` the one whose files are here."""
    if platform != "auto":
        return platform
    return next((name for name, files in DEVICE_FILES.items() if any(DEV.glob(files))), "cpu")


def set_environment(recipe: Recipe) -> None:
    """Give this process the environment of its device, and let rank 0 say so.

    Raises:
        BadRequest: the recipe asks for what the device hasn't.
    """
    applied = apply(recipe)
    if os.environ.get("RANK", "0") == "0":
        for line in said(applied):
            print(line, flush=True)
        for warning in stale(applied.device):
            print(f"trainwright: {warning}", file=sys.stderr, flush=True)


def apply(recipe: Recipe) -> Applied:
    """Set each variable of the preset that isn't set.

    Raises:
        BadRequest: `compile_cache.shared` on a device whose compiler reads through no folder to another.
    """
    device = device_of(recipe.platform)
    if recipe.compile_cache.shared is not None and device != "neuron":
        raise BadRequest(no_shared_cache(device))
    applied = Applied(device, {}, {})
    for variable in PRESETS[device]:
        value = variable.value(recipe)
        if value is None:
            continue
        if variable.name not in os.environ:
            os.environ[variable.name] = _given[variable.name] = value
        there = os.environ[variable.name]
        if _given.get(variable.name) == there:
            applied.given[variable.name] = there
        elif there != value:
            applied.kept[variable.name] = there
    return applied


def said(applied: Applied) -> Iterator[str]:
    """A line of what was given and what was kept; none where nothing was."""
    parts = {"given": applied.given, "kept": applied.kept}
    texts = [
        f'{key}="{" ".join(f"{name}={value}" for name, value in pairs.items())}"'
        for key, pairs in parts.items()
        if pairs
    ]
    if texts:
        yield f"environment={applied.device} {' '.join(texts)}"


def stale(device: str) -> Iterator[str]:
    """A warning for each variable of the environment that does nothing on the device."""
    for name, since, why in STALE[device]:
        if name in os.environ:
            yield f"{name} in the environment does nothing since Neuron {since}: {why}"


def in_force(platform: str) -> dict[str, str]:
    """What the environment says now under the names of the device's preset, for config.yaml."""
    names = [variable.name for variable in PRESETS[device_of(platform)]]
    return {name: os.environ[name] for name in names if name in os.environ}
